"""One tuning run on the GPUs of a Ray cluster, whatever models they are, while nodes come and go."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilebook import device as devices
from tilebook.errors import GpuLost, TuningError, UsageError, one_line
from tilebook.op import Op, Problem
from tilebook.registry import Layers, Registry
from tilebook.tuner.budget import Budget
from tilebook.tuner.cluster.host import Hello, Host, sources
from tilebook.tuner.cluster.remote import Remote
from tilebook.tuner.explore import Stopped
from tilebook.tuner.judge.measure import Mode
from tilebook.tuner.known import PREDICTED, Known
from tilebook.tuner.progress import Run, Watch
from tilebook.tuner.run import Outcome, versions
from tilebook.tuner.search import sampler
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import Shards, limit, quiet

_LOOK_S = 1.0
"""How often the cluster is asked for its nodes."""

PATIENCE_S = 120.0
"""So long a run waits, when none of its GPUs does anything, for one that could go on."""

_DEATHS = 5
"""So many hosts of a GPU may die in a row, none having finished a problem, before the GPU counts as unfit."""

_REACH_S = 10.0
_ENDING_S = 15.0  # for all hosts to end their processes


@dataclass(frozen=True)
class Wanted:
    """What a run asks of the cluster. gpu: a model, to measure on no other or, without GPUs, to compile for.

    workers: compilers a GPU; by default the cores that are its own.
    """

    problems: Sequence[tuple[Op[Any], Problem]]
    gpu: devices.Device | None
    measured: bool
    mode: Mode
    options: Options
    workers: int | None = None
    weights: Sequence[float] | None = None


@dataclass
class _Slot:
    """A place for a host: the `number`-th GPU of a node, or some of its cores.

    shards: its model's problems, once that is known. serving: it has a session. unfit: why it takes no part.
    """

    index: int
    node: str
    number: int
    name: str
    cpus: int
    remote: Remote | None = None
    thread: threading.Thread | None = None
    shards: Shards | None = None
    serving: bool = False
    deaths: int = 0
    unfit: str = ""

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


@dataclass
class _Model:
    gpu: devices.Device
    shards: Shards


class Cluster:
    """Gives each GPU of the cluster one problem at a time: a slot is a thread with a session, whose compilers and GPU
    are a host on a node. GPUs of one model share its problems."""

    def __init__(self, ray: Any, wanted: Wanted, writer: Registry, layers: Layers, run: Run) -> None:
        self.models: dict[tuple[str, str, int], _Model] = {}
        self._ray, self._wanted, self._run = ray, wanted, run
        self._writer, self._layers = writer, layers
        self._known: Known | None = None
        self._sources = sources(sorted({op.name for op, _ in wanted.problems}))
        self._slots: dict[tuple[str, int], _Slot] = {}
        self._numbers = itertools.count()
        self._host = ray.remote(Host)
        self._lock = threading.Lock()
        self._awake = threading.Event()
        self._broken: BaseException | None = None
        self._closed = self._waiting = False
        self._quiet_since = time.monotonic()

    def tune(self) -> None:
        """Until every problem has been tuned for every model that is here, or no GPU is left that could."""
        with quiet(), limit(self._run.budget, self._expire):
            try:
                while not self._over():
                    self._look()
                    self._awake.wait(_LOOK_S)
                    self._awake.clear()
            finally:
                self._end()
        if self._broken is not None:
            raise self._broken

    def outcomes(self, why: str, interrupted: bool) -> list[Outcome]:
        """What came of the run on each model. why: there is no verdict for a problem that no GPU has taken."""
        layer = self._layers.layers[0][0]
        for model in self.models.values():
            model.shards.finish(why)
        return [Outcome(each.shards.states, each.gpu, layer, interrupted) for each in self.models.values()]

    def _over(self) -> bool:
        if self._closed or self._broken is not None:
            return True
        running = [slot for slot in self._slots.values() if slot.running]
        if any(slot.serving for slot in running):
            self._quiet_since = time.monotonic()
            return False
        unfit = [slot.unfit for slot in self._slots.values() if slot.unfit]
        if not running and not self.models and unfit:
            raise TuningError(f"no GPU of the cluster can be used: {unfit[0]}")
        late = time.monotonic() - self._quiet_since > PATIENCE_S
        if self.models:
            done = all(model.shards.over for model in self.models.values())
            another = self._wanted.measured and any(slot.shards is None for slot in running)  # perhaps another model
            return late or (done and not another)
        if late and not self._slots:
            raise TuningError("no GPU is left in the cluster")
        if late and not self._waiting:  # all may be another's for now
            self._waiting = True
            self._run.tell("waiting for the cluster to have a GPU free …")
        return False

    def _look(self) -> None:
        """Starts hosts where there is room for them, and gives up those whose nodes are gone."""
        try:
            nodes = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
        except Exception as error:  # Ray has many, from gRPC's to its own
            raise TuningError(f"the Ray cluster does not answer any more: {one_line(error)[:200]}") from None
        for place, slot in list(self._slots.items()):
            if slot.node not in nodes:
                if slot.remote is not None:
                    slot.remote.lose("its node is gone")
                if not slot.running:
                    del self._slots[place]
        for node in nodes.values():
            for slot in self._places(node):
                if not slot.running and self._wanting(slot):
                    slot.thread = threading.Thread(target=self._attend, args=[slot], name=slot.name, daemon=True)
                    slot.thread.start()

    def _places(self, node: Mapping[str, Any]) -> Iterator[_Slot]:
        """The slots of a node: a GPU each; without GPUs as many cores each as one is to have compilers."""
        resources, wanted = node["Resources"], self._wanted
        cores = int(resources.get("CPU", 0))
        count = int(resources.get("GPU", 0)) if wanted.measured else cores // (wanted.workers or 1)
        for number in range(count):
            if (node["NodeID"], number) not in self._slots:
                if not wanted.measured and self._live >= len(wanted.problems):
                    return  # more would have nothing to do
                host = node["NodeManagerHostname" if node["NodeName"] == node["NodeManagerAddress"] else "NodeName"]
                name = f"{'GPU' if wanted.measured else 'worker'} {number} of {host}"
                cpus = cores // count if wanted.measured else wanted.workers or 1
                self._slots[node["NodeID"], number] = _Slot(next(self._numbers), node["NodeID"], number, name, cpus)
            yield self._slots[node["NodeID"], number]

    @property
    def _live(self) -> int:
        return sum(not slot.unfit and (slot.running or slot.shards is None) for slot in self._slots.values())

    def _wanting(self, slot: _Slot) -> bool:
        """Would a host there have something to do, as far as is known?"""
        return not slot.unfit and not (slot.shards is not None and slot.shards.over)

    # In a slot's own thread

    def _attend(self, slot: _Slot) -> None:
        """A host's whole life."""
        before = self._finished(slot)
        try:
            slot.remote = remote = self._start(slot)
            session = self._admit(slot, remote, remote.hello(sorted(self._sources)))
            slot.serving = True
            assert slot.shards is not None
            slot.shards.serve(session)
        except Stopped:
            pass
        except GpuLost as lost:
            slot.deaths = 1 if self._finished(slot) > before else slot.deaths + 1
            if slot.deaths >= _DEATHS:
                self._refuse(slot, str(lost))
        except Exception as error:
            if slot.serving:  # the registry, say: nothing of the host's
                self._broken = self._broken or error
            else:
                self._refuse(slot, f"{slot.name}: {one_line(error)[:300]}")
        finally:
            slot.serving = False
            if slot.remote is not None:
                slot.remote.end()
            self._awake.set()

    def _finished(self, slot: _Slot) -> int:
        return sum(state.gpu == slot.index for state in list(self._run.done))

    def _start(self, slot: _Slot) -> Remote:
        """A host on the slot's node, once the cluster has given it the GPU and the cores."""
        wanted = self._wanted
        node = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(slot.node, soft=False)
        workers = wanted.workers or max(1, slot.cpus - wanted.measured)  # what measures needs a core, too
        options = {"num_cpus": slot.cpus, "num_gpus": int(wanted.measured), "scheduling_strategy": node}
        actor = self._host.options(max_restarts=0, max_task_retries=0, **options)
        gpu = None if wanted.measured else wanted.gpu
        remote = Remote(self._ray, actor.remote(gpu, wanted.mode, workers), workers, slot.name)
        if self._closed:
            remote.close()
        return remote

    def _admit(self, slot: _Slot, remote: Remote, hello: Hello) -> Session:
        """A session on a host, which is then one of its model's. Raises TuningError where it cannot take part."""
        wanted, run, gpu = self._wanted, self._run, hello.device
        if hello.sources != self._sources:
            raise TuningError("another version of tilebook's kernels")
        if wanted.measured and wanted.gpu is not None and not devices.is_here(wanted.gpu, gpu):
            raise TuningError(f"a {gpu.name}, not a {wanted.gpu.name}")
        environment = versions(hello.environment, wanted.measured)
        with self._lock:
            if self._known is None:
                mode = wanted.mode if wanted.measured else PREDICTED
                self._known = Known(self._writer, self._layers, gpu, environment, mode)
            known = self._known.beside(gpu, environment, hello.machine)
            where = f"{slot.name}, {gpu.name}" if wanted.measured else slot.name
            runner = remote if wanted.measured else None
            session = Session(
                gpu, known, remote, runner, wanted.options, run, slot.index, compilers=remote.workers, where=where
            )
            if gpu.identity not in self.models:
                shards = Shards(wanted.problems, session, run, wanted.weights)
                run.total += len(wanted.problems)
                self.models[gpu.identity] = _Model(gpu, shards)
            slot.shards = self.models[gpu.identity].shards
            slot.shards.join(session)
            if self._closed:
                slot.shards.close()
        return session

    def _refuse(self, slot: _Slot, why: str) -> None:
        slot.unfit = why
        if not self._closed:
            self._run.tell(f"not used: {why}")

    # The end

    def _expire(self) -> None:
        self._closed = True
        with self._lock:
            for model in self.models.values():
                model.shards.expire()
        self._awake.set()

    def _end(self) -> None:
        """Ends all sessions and hosts; what is still being started, too."""
        self._closed = True
        with self._lock:
            for model in self.models.values():
                model.shards.close()
        for slot in list(self._slots.values()):
            if slot.remote is not None:
                slot.remote.close()
        deadline = time.monotonic() + _ENDING_S
        for slot in list(self._slots.values()):
            if slot.thread is not None:
                slot.thread.join(max(0.0, deadline - time.monotonic()))


def tune_cluster(
    problems: Sequence[tuple[Op[Any], Problem]],
    address: str,
    *,
    gpu: str | None = None,
    mode: Mode = "graph",
    registry: str | None = None,
    budget_s: float | None = None,
    trials: int | None = None,
    method: str = "tpe",
    workers: int | None = None,
    seed: int = 0,
    force: bool = False,
    weights: Sequence[float] | None = None,
    watch: Watch = contextlib.nullcontext,
) -> list[Outcome]:
    """Tunes the problems on each GPU model of a Ray cluster and returns what happened, by model, also after Ctrl-C.

    address: "auto" for the cluster that this machine is in, "host:port" for one of several, "ray://host:10001" from
    outside. workers: compilers of each GPU. The others are as `tune_problems` has them.
    Raises UsageError where there is no such cluster, and where it has no GPU and no model is named.
    """
    budget = Budget(budget_s)
    named = None if gpu is None else devices.find(gpu)
    if method != "grid":
        sampler(method, seed)
    layers = Layers.default(registry)
    options = Options(trials=trials, seed=seed, method=method, force=force)
    with layers.writer() as writer, _connected(address) as ray:
        measured = any(node["Resources"].get("GPU", 0) >= 1 for node in ray.nodes() if node["Alive"])
        if not measured and named is None:
            raise UsageError("there is no GPU in the cluster: name a model with --gpu to compile and rank for it")
        budget.measured = measured
        wanted = Wanted(problems, named, measured, mode, options, workers, weights)
        run = Run(0, measured, budget, gpus=2)
        cluster, interrupted, why = Cluster(ray, wanted, writer, layers, run), False, "no GPU of its model is left"
        with watch(run):
            try:
                cluster.tune()
            except KeyboardInterrupt:
                interrupted, why = True, "interrupted"
            if not cluster.models:
                if interrupted:
                    raise KeyboardInterrupt
                raise TuningError("the budget was spent before the cluster had a GPU free")
            if budget.limited and budget.left_s <= 0:
                why = "the budget was spent before its turn"
            return cluster.outcomes(why, interrupted)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster while the block lasts; as it is where the program is connected already."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ModuleNotFoundError as missing:
        if missing.name != "ray":
            raise
        raise TuningError("--ray needs ray: pip install 'ray[client]'") from None
    if ray.is_initialized():
        yield ray
        return
    # Ray prints what it has to say of nodes on stdout, where nobody else prints while a run goes.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            _reach(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # no cluster there, other versions of Ray or Python, no gRPC for ray://, …
            how = "start one with `ray start --head`, or give its address"
            raise UsageError(f"--ray {address}: no such Ray cluster: {one_line(error)[:300]} ({how})") from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
