"""Runs an op with what serves it best on this GPU: a known call's choice → verdicts → PyTorch's own or our default.

Never tunes, never waits, never raises into training: where the registry is missing or broken, or a winner does not run
here, something else computes the right numbers, after one warning. What a registry revokes never runs.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from tilebook import device as devices
from tilebook import logs
from tilebook import registry as store
from tilebook.device import Device
from tilebook.dispatch.agreement import Agreement, Told
from tilebook.dispatch.choice import Choice, Outputs, Source
from tilebook.dispatch.memo import Memo, key
from tilebook.dispatch.misses import misses_of, store_misses
from tilebook.dispatch.nearness import FARTHEST
from tilebook.dispatch.snapshot import Snapshot, ahead, pytorch
from tilebook.layout import fits
from tilebook.op import Config, Op, Problem
from tilebook.registry.served import Served
from tilebook.variables import PROBE, value

__all__ = [
    "FARTHEST",
    "Choice",
    "Dispatch",
    "Outputs",
    "Snapshot",
    "Source",
    "ahead_of",
    "backward_of",
    "backward_probed",
    "choose",
    "forced",
    "key",
    "known",
    "lookup",
    "misses",
    "own",
    "reload",
    "run",
    "use",
]


class Dispatch:
    """Choices made so far and what they were made from. A program has one; tests make more."""

    def __init__(self) -> None:
        self.forced: tuple[str, Config | None] | None = None
        self.left: dict[Any, Any] = {}  # see `tilebook.left`
        self.seen: dict[Any, Any] = {}  # likewise
        self.watchers: list[Callable[[str], None]] = []  # told of "changed" and "counted"
        self.measured: dict[tuple[str, str], float] = {}  # by op and problem, milliseconds of a call, see `profiling`
        self._lock = threading.Lock()
        self._memo = Memo()
        self._snapshots: dict[int, Snapshot] = {}
        self._warned: set[str] = set()
        self._told: set[str] = set()
        self._agreement = Agreement()
        self.prober: Any = None  # see `dispatch.probing`
        self._inherited: dict[int, int] = {}  # by a choice's id, the calls that a parent process made and counts

    def run(self, op: Op[Any], *args: Any) -> Outputs:
        """One call of the op with the implementation and config chosen for it; PyTorch's where no kernel can run it."""
        return self.lookup(op, args)(*args)

    def known(self, op: Op[Any], args: Sequence[Any]) -> Choice | None:
        """The choice for a call like one made before, else None. Such a call needs no checks: it has passed them."""
        if self.forced is not None:
            return None
        self._join()
        return self._memo.of(op, args)

    def backward_of(self, choice: Choice) -> Choice:
        """What would run for the backward pass of a choice's problem; the choice itself where none is known."""
        if choice.backward is None:
            op, gpu = choice.implementation.op.backward, choice.gpu
            if op is None or gpu is None or choice.source == "forced":
                choice.backward = choice
            else:
                problem = op.problem(**{f.name: getattr(choice.problem, f.name) for f in fields(choice.problem)})
                snapshot = self._snapshot_of(gpu)
                choice.backward = pytorch(op, problem, gpu) if snapshot is None else self._choose(snapshot, op, problem)
        return choice.backward

    def own(self, choice: Choice) -> Choice:
        """Our own kernel for a choice's problem, where PyTorch has no function for it; the choice if none runs."""
        op = choice.implementation.op
        if choice.own is None:
            snapshot = self._snapshot_of(choice.gpu)
            if choice.source == "forced" or choice.implementation is op.tunable or snapshot is None:
                return choice
            try:
                found = snapshot.own(op, choice.problem)
            except Exception:  # of the same verdict as when the choice was made, which has warned
                found = None
            if found is None:
                return choice
            found.instead, choice.own = self._spare, found
        return choice.own

    def lookup(self, op: Op[Any], args: Sequence[Any], call: Sequence[Any] | None = None) -> Choice:
        """What runs this call. A call like one made before is known by its key, in about a microsecond an argument.

        `call` is all that the caller looks at to know it again, where that is more than the op's arguments.
        """
        if self.forced is not None and (choice := self._force(op, args)) is not None:
            return choice
        if not args[0].is_cuda:
            return pytorch(op, op.problem.of(*args))
        self._join()
        call = args if call is None else call
        choice = self._memo.of(op, call)
        if choice is None:
            choice = self.choose(op, op.problem.of(*args), args[0].device)
            choice.aligned = all(fits(x) for x in args[:3] if isinstance(x, torch.Tensor))
            if self._settled(choice):
                if self.prober is not None:
                    choice.probe = self.prober.of(choice)
                with self._lock:  # another thread's choice would change what is walked here
                    self._memo.keep(op, call, choice)
                choice.kept = True
        return choice

    def choose(self, op: Op[Any], problem: Problem, device: torch.device) -> Choice:
        """What would run for this problem on this device. Reads the registry once per process and device."""
        if device.type != "cuda":
            return pytorch(op, problem)
        self._join()
        index = device.index if device.index is not None else torch.cuda.current_device()
        gpu = devices.current(index)
        with self._lock:
            if index not in self._snapshots:
                if torch.cuda.is_current_stream_capturing():
                    # Nothing may be read now, so nobody knows whether the default is revoked.
                    return Choice(op.uncompiled(problem, gpu), None, "fallback", problem, gpu)
                self._snapshots[index] = Snapshot(gpu)
                if self.prober is not None:
                    self.prober.remind(self._snapshots[index])
            snapshot = self._snapshots[index]
        choice = self._choose(snapshot, op, problem)
        choice.instead = self._spare
        if logs.log.isEnabledFor(logging.DEBUG) and (told := choice.because) not in self._told:
            self._told.add(told)
            logs.log.debug(told)
        return choice

    @property
    def leads(self) -> bool:
        """Is it this process of a distributed program that finds out what is fastest, for all?"""
        return self._agreement.leads

    def keyed_by(self, made: Callable[[Op[Any], Sequence[Any]], tuple[Any, ...]]) -> None:
        """See `Memo.keyed_by`."""
        with self._lock:
            self._memo.keyed_by(made)

    @property
    def kinds(self) -> int:
        """How many kinds of calls are known."""
        return len(self._memo)

    def contenders(self, op: Op[Any], problem: Problem, gpu: Device, most: int) -> list[Any]:
        """See `Snapshot.contenders`."""
        snapshot = self._snapshot_of(gpu)
        return [] if snapshot is None else snapshot.contenders(op, problem, most)

    def backward_probed(self, choice: Choice) -> bool:
        """Are calls of the backward pass looked at, of a call that is PyTorch's own forward?"""
        if self.prober is None:
            return False
        backward = self.backward_of(choice)
        if backward.probe is None and backward is not choice:
            backward.probe = self.prober.of(backward)
        return backward.probed

    def begin_probing(self, prober: Any) -> None:
        """Has it look at calls from now on, of all kinds."""
        self.prober = prober
        self._forget()

    def settled(self, op: Op[Any], problem: Problem, gpu: Device, served: Served | None) -> None:
        """What serves a problem has been found out: it does from now on."""
        snapshot = self._snapshot_of(gpu)
        if snapshot is not None and served is not None:
            snapshot.observe(served)
            mine = snapshot.choose(op, problem)
            self._agreement.announce(op, problem, gpu, _told(mine))
        self._refresh([(op.name, problem.key)])

    def follow(self) -> None:
        """Takes what the process that leads has found out since, if anything."""
        if heard := self._agreement.heard():
            self._refresh(heard)

    def look_again(self) -> None:
        """Has dispatch asked about calls that it was not asked about any more."""
        self.left.clear()
        self.seen.clear()
        self._tell("changed")

    def _refresh(self, problems: Sequence[tuple[str, str]]) -> None:
        """Forgets what was chosen for these problems, by op and key."""

        def among(choice: Choice | None) -> bool:
            return choice is not None and (choice.implementation.op.name, choice.problem.key) in problems

        with self._lock:
            for known, choice in list(self._memo.items()):
                if among(choice):
                    self._memo.pop(known, None)
                if among(choice.backward):
                    choice.backward = None
        self.look_again()

    def ahead_of(self, op: Op[Any], problem: Problem, device: torch.device, other: str) -> bool:
        """Is a kernel of ours what runs, by a verdict that measured it as faster than this other implementation?"""
        choice = self.choose(op, problem, device)
        return choice.source == "exact" and bool(choice.implementation.digest) and ahead(choice, other)

    @contextmanager
    def use(self, implementation: str, config: Config | None = None) -> Iterator[None]:
        """Inside the block every op that has it runs this implementation, with this config or its default.

        For tests and comparisons: it holds for what is revoked, and for tensors on the CPU too (a Triton kernel then
        needs `TRITON_INTERPRET=1`), in every thread.
        """
        previous, self.forced = self.forced, (implementation, config)
        try:
            self._tell("changed")
            yield
        finally:
            self.forced = previous
            self._tell("changed")

    def reload(self) -> None:
        """Forgets what was read: the next call reads the registry again."""
        with self._lock:
            self._snapshots.clear()
            self._warned.clear()
            self._told.clear()
        self._forget()

    def _join(self) -> None:
        """Forgets what was chosen if there is a process group by now: from then on all processes choose alike."""
        if self._agreement.begun():
            self._forget()

    def _forget(self) -> None:
        """Forgets what was chosen."""
        with self._lock:
            self._memo.clear()
            self.left.clear()
            self.seen.clear()
        self._tell("changed")

    def _tell(self, event: str) -> None:
        for watcher in self.watchers:
            watcher(event)

    def misses(self) -> list[store.Miss]:
        """The problems that this process asked for and no verdict covers, heaviest first."""
        self._tell("counted")
        kept = list(self._memo.values())
        # Gradients of calls that are left whole have run where somebody has counted them.
        behind = [each.backward for each in kept if each.backward is not None and each.backward is not each]
        return misses_of([*kept, *behind], self._inherited, self.measured)

    def forked(self) -> None:
        """Told in a process that was forked off: the calls until now are its parent's to count."""
        self._tell("counted")
        self._inherited = {id(choice): choice.calls for choice in self._memo.values()}

    def _choose(self, snapshot: Snapshot, op: Op[Any], problem: Problem) -> Choice:
        try:
            mine = snapshot.choose(op, problem)
        except Exception as broken:  # a verdict that nobody thought of must not stop a training run
            self._warn_once(f"{op.name} {problem.label}", f"no verdict could be used ({broken}); the default serves")
            mine = snapshot.default(op, problem)
        return self._agreed(snapshot, op, problem, mine)

    def _agreed(self, snapshot: Snapshot, op: Op[Any], problem: Problem, mine: Choice) -> Choice:
        """What all processes of a distributed program run: mine, or what another of them has chosen before."""
        told = _told(mine)
        decided = self._agreement.settle(op, problem, snapshot.gpu, told)
        if decided == told:
            return mine
        found = snapshot.told(op, problem, decided)
        if found is None:
            about = "another process of this program runs what cannot run here; PyTorch's own serves"
            self._warn_once(f"{op.name} {problem.label}", about)
            return pytorch(op, problem, snapshot.gpu)
        return found

    def _snapshot_of(self, gpu: Device | None) -> Snapshot | None:
        """What has been read of the verdicts for this GPU model, if anything has."""
        return next((each for each in list(self._snapshots.values()) if each.gpu == gpu), None)

    def _settled(self, choice: Choice) -> bool:
        """May this choice be kept? Not one made blind, because a graph was being captured."""
        return choice.gpu is None or self._snapshot_of(choice.gpu) is not None

    def _force(self, op: Op[Any], args: Sequence[Any]) -> Choice | None:
        """The choice that `use` asks for, if the op has it and it can run this."""
        assert self.forced is not None
        name, config = self.forced
        implementation, problem = op.implementations.get(name), op.problem.of(*args)
        if implementation is None or not implementation.supports(problem):
            return None
        space = implementation.space
        if space is not None and config is not None:
            config = space.config(config)
        if space is None or (config is not None and not space.contains(config)):
            config = None
        gpu = devices.current(args[0].get_device()) if args[0].is_cuda else devices.find("H200")
        if space is not None and config is None:
            config = space.default(problem, gpu)
        return Choice(implementation, config, "forced", problem, gpu)

    def _spare(self, broken: Choice) -> Choice | None:
        """What serves instead of a choice that raised: the default, then PyTorch, whose errors are real."""
        op = broken.implementation.op
        plain = pytorch(op, broken.problem, broken.gpu)
        if broken.implementation is plain.implementation:
            return None
        snapshot = self._snapshot_of(broken.gpu)
        spare = plain if snapshot is None else snapshot.default(op, broken.problem)
        if (spare.implementation, spare.config) == (broken.implementation, broken.config):
            spare = plain
        spare.instead = self._spare
        return spare

    def _warn_once(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"tilebook: {about}: {text}", RuntimeWarning, stacklevel=4)


def _told(choice: Choice) -> Told:
    config = None if choice.config is None else dict(choice.config)
    return choice.implementation.name, config, choice.source, choice.implementation.digest


here = Dispatch()
"""The program's own."""

run, lookup, known, choose = here.run, here.lookup, here.known, here.choose
backward_of, own = here.backward_of, here.own
use, reload, misses, ahead_of = here.use, here.reload, here.misses, here.ahead_of
backward_probed = here.backward_probed


def forced() -> bool:
    """Is an implementation being forced, by `use`?"""
    return here.forced is not None


logs.begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=here.forked)


@atexit.register
def _store_misses() -> None:
    store_misses(here.misses())


def _probe() -> None:
    from tilebook.dispatch.probing import probe

    probe()


if value(PROBE) == "yes":
    _probe()
