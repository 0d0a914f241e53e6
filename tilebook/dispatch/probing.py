"""A running program settles problems that no verdict is on: PyTorch's own and candidates take turns in its calls.

Off by default. Candidates are what verdicts on the nearest problems have won. They compile in a process of their own,
are verified once, on numbers of their own and aside from the program's stream, and are timed by events that are read
when they have come to pass. What has been found is an *observed* verdict: the registry keeps it until a tune knows
better. Whatever goes wrong, the call is the usual one.
"""

from __future__ import annotations

import atexit
import os
import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from tilebook import registry as store
from tilebook.device import Device
from tilebook.dispatch import Dispatch, here
from tilebook.dispatch.choice import Choice
from tilebook.dispatch.settling import LOOKS, TURN_S, Candidate, Gpu, Probe, Settling
from tilebook.dispatch.snapshot import Snapshot
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.registry import Verdict
from tilebook.registry.served import of as of_verdict

__all__ = ["Prober", "Settling", "probe", "stop"]

SHARE = 0.01
"""How much of a program's time so far may go to probing."""

MOST_S = 0.2
"""What one problem may take of it, in one direction."""

CANDIDATES = 3

IDLE = 64
"""The GPU waits for the host where, of so many calls, it was not yet at what came before in less than a quarter."""

_IN_PARTS = frozenset({"mlp"})  # families whose call is several ops, none of which is what PyTorch's call is beside
_LEAST_S = 5e-6  # calls that no GPU takes longer for are the host's
_REPEATS = 3  # a candidate that is wrong in every third run is seen
_SPARE_BYTES, _SPARE = 2 << 30, 16  # memory that it needs at most, and by how much what a call moves counts

_WAKING_S = 100e-6  # what it takes to find out again who serves a kind of call
_CHUNK_S = 0.02  # less time is not worth waking up for
_TIMING_S = 64 * 2 * TURN_S  # what a problem takes once it is verified
_TICK_S, _WAKE_S, _HEAR_S, _KEEP_S, _JOIN_S = 0.25, 2.0, 2.0, 60.0, 2.0

Started = Callable[[Op[Any], Implementation, Problem, Config, Device], "Future[Any]"]


class Prober:
    """The problems that a program settles, and what it may spend on that."""

    def __init__(self, dispatch: Dispatch = here, gpu: Any = None, compile: Started | None = None) -> None:
        self.gpu, self._watched = gpu or Gpu(), gpu is None
        self.random = random.Random(0)
        self.spent_s, self.verified = 0.0, False
        self.states: dict[Any, Settling | None] = {}
        self._dispatch, self._compile = dispatch, compile or self._compiling
        self._began = self._kept = self._heard = self.gpu.now()
        self.found: list[Verdict] = []
        self._written = 0
        self._wrong: set[tuple[str, str, str]] = set()
        self._told: set[type[Exception]] = set()
        self._pools: dict[Any, Any] = {}
        self._woke = -_WAKE_S
        self._thread: threading.Thread | None = None
        self._lock, self._over = threading.RLock(), threading.Event()
        self._process = os.getpid()

    def of(self, choice: Choice) -> Probe | None:
        """What is to look at a choice's calls, if its problem is one to be settled."""
        op, problem, gpu = choice.implementation.op, choice.problem, choice.gpu
        if gpu is None or choice.source in ("exact", "forced") or not choice.aligned or not op.fused(problem):
            return None
        if self._over.is_set() or self._process != os.getpid() or torch.are_deterministic_algorithms_enabled():
            return None
        key = op.name, problem.key, gpu.identity
        with self._lock:
            if self._thread is None and self._watched:
                self._thread = threading.Thread(target=self._watch, name="tilebook-probe", daemon=True)
                self._thread.start()
            if not self._dispatch.leads:
                return None
            if key not in self.states:
                began, self.states[key] = self.gpu.now(), None
                with suppress(Exception):  # a problem without a cost, compilers that do not start
                    self.states[key] = self._begun(op, problem, gpu)
                self.spent_s += self.gpu.now() - began
            state = self.states[key]
        return None if state is None or state.done else Probe(self, state, choice)

    def _begun(self, op: Op[Any], problem: Problem, gpu: Device) -> Settling | None:
        """A problem that has just been met; None where there is nothing to try, or too much to pay for it."""
        if problem.floor_s(gpu) < _LEAST_S or op.family in _IN_PARTS:
            return None
        candidates = self._dispatch.contenders(op, problem, gpu, CANDIDATES)
        state = Settling(op, problem, gpu, [each for each in candidates if _named(each) not in self._wrong])
        if not state.alive or state.expected_s > MOST_S / 2:
            return None
        for implementation, config in state.alive:
            if config is not None:
                future = self._compile(op, implementation, problem, config, gpu)
                state.compiled[implementation, config] = future
        return state

    def _compiling(
        self, op: Op[Any], implementation: Implementation, problem: Problem, config: Config, gpu: Device
    ) -> Future[Any]:
        """In a process of its own, into Triton's cache, as a tune does it."""
        from tilebook.tuner.process.compile import CompilePool

        pool = self._pools.get(gpu.identity)
        if pool is None:
            pool = self._pools[gpu.identity] = CompilePool(gpu, workers=1)
            threads: Any = threading
            threads._register_atexit(self.close)  # before its threads are waited for, with all that they have to do
        return pool.submit(op.name, implementation.name, problem.key, config)

    def allowance_s(self) -> float:
        """What may be spent now."""
        return SHARE * (self.gpu.now() - self._began) - self.spent_s

    def affords(self, state: Settling) -> bool:
        """May its next step be made? It pauses where there is no time for it, and ends where it has spent its own."""
        if state.spent_s + state.expected_s > MOST_S:
            self.end(state)
        elif self.allowance_s() < state.expected_s:
            state.active = False
        return state.active

    def spend(self, state: Settling, seconds: float, once: bool = False) -> None:
        """once: what a process pays when it first verifies anything, or a kernel is loaded, is no problem's own."""
        with self._lock:
            self.spent_s += seconds
        if not once:
            state.spent_s += seconds

    def _pending(self) -> list[Settling]:
        return [each for each in list(self.states.values()) if each is not None and not each.done]

    def tick(self) -> None:
        """What is to be done now and then: look again who serves, keep what was found."""
        if not self._dispatch.leads:
            for each in self._pending():
                each.active = False
            if self.gpu.now() - self._heard >= _HEAR_S:
                self._heard = self.gpu.now()
                self._dispatch.follow()
            return
        if self.gpu.now() - self._woke >= _WAKE_S:
            self._wake()
        if self.gpu.now() - self._kept > _KEEP_S:
            self.keep()

    def _wake(self) -> None:
        """Has calls of so many problems looked at as there is time to settle: verified ones, then by weight."""
        waking_s = _WAKING_S * self._dispatch.kinds
        rest_s, chosen = self.allowance_s() - waking_s, []
        if rest_s < max(_CHUNK_S, 10 * waking_s):
            return
        waiting = [each for each in self._pending() if each.ready]
        for each in sorted(waiting, key=lambda each: (not each.verified, -each.problem.floor_s(each.gpu))):
            needed_s = each.expected_s + _TIMING_S
            if needed_s <= rest_s:
                rest_s -= needed_s
                chosen.append(each)
        if chosen:
            self._woke = self.gpu.now()
            with self._lock:
                self.spent_s += waking_s
            for each in chosen:
                each.active = True
            self._dispatch.look_again()

    def verify(self, state: Settling, like: torch.Tensor) -> None:
        """Leaves those that compile and are right, by the rule of a tune, on numbers of their own."""
        from tilebook.tuner.judge.verify import Case, Wrong, verify

        needed = _SPARE_BYTES + _SPARE * state.problem.cost().bytes
        if not self.gpu.room(like, needed):
            raise MemoryError(f"{needed / 2**30:.0f} GiB are not free")
        with self.gpu.aside(like) as place:
            case = Case.make(state.op, state.problem, place, self.random.randrange(1 << 30))
            for each in state.tried:
                try:
                    compiled = state.compiled[each].result() if each in state.compiled else None
                    if _named(each) in self._wrong or getattr(compiled, "failure", None):
                        raise Wrong(getattr(compiled, "reason", "wrong on another problem"))
                    verify(*each, [case], _REPEATS)
                except Exception as wrong:
                    if isinstance(wrong, Wrong):
                        self._wrong.add(_named(each))
                    self.drop(state, each, wrong)
        state.verified = self.verified = True

    def drop(self, state: Settling, candidate: Candidate, why: Exception) -> None:
        """A candidate that is not right, or does not run, is none any more."""
        name, config = candidate[0].name, candidate[1] or ""
        self._warn(state, f"{name} {config} is not what serves it: {type(why).__name__}: {str(why)[:200]}")
        state.drop(candidate)
        if not state.alive:
            self.end(state)

    def read(self, state: Settling) -> None:
        """Takes the times that are there, and looks at them when it is time to."""
        while state.unread and state.unread[0][3].query():
            its, who, start, end = state.unread.popleft()
            its[who] = start.elapsed_time(end)
            if who is not None and state.own_ms:
                self.spend(state, max(0.0, its[who] - state.own_ms[-1]) / 1e3)
        if state.idle >= IDLE and state.idle > 3 * sum(map(len, state.rounds)):
            state.looks = 0  # the host's to bound, and nothing that a verdict is about
            self.end(state)
        if state.active and state.looks < len(LOOKS) and len(state.whole) >= LOOKS[state.looks]:
            self._look(state)

    def _look(self, state: Settling) -> None:
        from tilebook.tuner.judge.stats import PROMOTION

        state.looks += 1
        ratios = {each: state.lead(each) for each in state.alive}
        ahead = [each for each in ratios if ratios[each].low > PROMOTION]
        if ahead:
            return self.end(state, winner=max(ahead, key=lambda each: ratios[each].value))
        for each, ratio in ratios.items():
            if ratio.high <= PROMOTION:
                state.drop(each)
        if not state.alive or state.looks == len(LOOKS):
            self.end(state)
        return None

    def end(self, state: Settling, broken: Exception | None = None, winner: Candidate | None = None) -> None:
        """The winner serves from now on, PyTorch's own where nothing has won; kept if times were compared."""
        state.active, state.done = False, True
        state.unread.clear()
        if broken is not None and type(broken) not in self._told:  # once of each kind
            self._told.add(type(broken))
            self._warn(state, f"its calls cannot be compared: {type(broken).__name__}: {str(broken)[:200]}")
        found = None if broken is not None or not state.looks else state.verdict(winner)
        if found is not None:
            self.found.append(found)
        served = None if found is None else of_verdict(found, "observed")
        self._dispatch.settled(state.op, state.problem, state.gpu, served)

    def remind(self, snapshot: Snapshot) -> None:
        """Tells a snapshot that has just been read what has been found until now."""
        for each in self.found:
            if each.device.content() == store.Device(*snapshot.gpu.identity).content():
                snapshot.observe(of_verdict(each, "observed"))

    def keep(self) -> None:
        """Writes what has been found since into the registry, if one can be written."""
        self._kept = self.gpu.now()
        rest, count = self.found[self._written :], len(self.found)
        if not rest:
            return
        try:
            with store.Layers.default().writer() as registry:
                registry.merge((), rest)
            self._written = count
        except Exception as broken:  # what was found serves this program all the same
            warnings.warn(f"tilebook: what was observed is not kept: {broken}", RuntimeWarning, stacklevel=2)
            self._written = count

    def close(self) -> None:
        """Looks at nothing any more, and keeps what it has found."""
        if self._over.is_set() or self._process != os.getpid():
            return
        self._over.set()
        for each in self._pending():
            each.active, each.done = False, True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_S)
        for pool in self._pools.values():
            pool.close()
        self.keep()

    def _watch(self) -> None:
        began = self.gpu.now()
        with suppress(Exception):  # loaded before any problem is looked at, or the first would pay for it
            import tilebook.tuner.judge.stats
            import tilebook.tuner.judge.verify  # noqa: F401
        with suppress(Exception):  # and Triton's C code, which the first kernel on a machine waits for
            import triton

            triton.runtime.driver.active.utils  # noqa: B018
        with self._lock:
            self.spent_s += self.gpu.now() - began
        while not self._over.wait(_TICK_S):
            try:
                self.tick()
            except Exception as broken:
                warnings.warn(f"tilebook: probing has ended: {broken}", RuntimeWarning, stacklevel=2)
                return

    def _warn(self, state: Settling, text: str) -> None:
        warnings.warn(f"tilebook: {state.op.name} {state.problem.label}: {text}", RuntimeWarning, stacklevel=4)


def _named(candidate: Candidate) -> tuple[str, str, str]:
    implementation, config = candidate
    return implementation.op.name, implementation.name, "" if config is None else config.key


class Probing:
    """Probing that has begun, and ends with the block, if it is used as one, or with the program."""

    def __init__(self) -> None:
        self._mine = here.prober is None
        if self._mine:
            here.begin_probing(Prober())

    def __repr__(self) -> str:
        state = "on" if here.prober is not None else "ended"
        return f"<tilebook probing, {state}{'' if torch.cuda.is_available() else '; there is no GPU here to probe'}>"

    def __enter__(self) -> Probing:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._mine:
            stop()


def probe() -> Probing:
    """From now on the program settles problems that no verdict is on by its own calls; as a block, while that lasts.

    The first calls of a problem take turns: PyTorch's own, and what has won on the nearest problems of this GPU model.
    Candidates are verified before, and timed by events; the one that is shown faster serves from then on, PyTorch's own
    if none is. At most 1 % of the program's time goes to it, and 200 ms to a problem. The registry keeps what was found
    as observed verdicts, which a tune replaces. `TILEBOOK_PROBE=1` in the environment is the same. Off by default.

    Numbers may differ in rounding from call to call while calls take turns. Nothing is probed while a graph is captured
    or a program is traced, or under `torch.use_deterministic_algorithms(True)`; of a distributed program the first
    process probes, and the others take its outcome when they hear of it.
    """
    return Probing()


def stop() -> None:
    """Ends probing, and keeps what was found."""
    if here.prober is not None:
        here.prober.close()
        here.prober = None


atexit.register(stop)
