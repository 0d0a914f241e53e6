"""Recorded sweeps of one GPU in its place: what runs over problems is judged without it, on a simulated clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tilebook import op as ops
from tilebook.errors import TuningError, UsageError
from tilebook.op import Op, Problem
from tilebook.registry import Failure
from tilebook.tuner.audit.subjects import Bench
from tilebook.tuner.budget import Budget
from tilebook.tuner.process.runner import Attempt, Candidate
from tilebook.tuner.sweeps.recorded import Machine
from tilebook.tuner.sweeps.sweep import Sweep, read

PREPARE_S = 1.1
"""Seconds before a problem's first candidate: the median of the verdicts for an H200 that ship and tell it."""


class Costed(Machine):
    """A machine that takes time for what a sweep does not record, too: to prepare a problem, to verify finalists, for a
    fresh process. For the last two as much as a run expects that knows nothing yet (see `Budget`)."""

    def __init__(self, sweep: Sweep, workers: int = 16) -> None:
        super().__init__(sweep, workers)
        self._usual = Budget()
        self._proven: frozenset[Candidate] = frozenset()

    def _spend(self, part: str, times: int = 1) -> None:
        self.now += times * self._usual.expected("", part)

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        self._proven = frozenset()
        self.now += PREPARE_S

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        new = frozenset(candidates) - self._proven
        if fresh:
            self._spend("fresh")
        elif new:
            first = not self._proven
            self._spend("first", first)
            self._spend("each", len(new) - first)
        self._proven = (frozenset() if fresh else self._proven) | new
        return super().confirm(candidates, rounds, seed, fresh=fresh)


class Machines:
    """A runner over the sweeps of several problems. What is measured by its worker is compiled there first, one after
    the other. `now` is the time that all of them have taken together."""

    def __init__(self, sweeps: Iterable[Sweep]) -> None:
        self._sweeps = {(each.header["op"], each.header["problem"]): each for each in sweeps}
        self._machines: dict[tuple[str, str], Costed] = {}
        self._compiled: set[tuple[tuple[str, str], Candidate]] = set()  # and kept on the disk, for other processes too
        self._current: tuple[str, str] = ("", "")

    @property
    def now(self) -> float:
        return sum(machine.now for machine in self._machines.values())

    def prepare(self, op: Op[Any], problem: Problem) -> None:
        self._current = op.name, problem.key
        if self._current not in self._sweeps:
            raise TuningError(f"no sweep of {op.name} {problem.label} was recorded")
        if self._current not in self._machines:
            self._machines[self._current] = Costed(self._sweeps[self._current])
        self._machines[self._current].prepare(op, problem)

    def attempt(self, candidate: Candidate, most_ms: float | None) -> Attempt:
        broken = self._compile(candidate)
        return broken or self._machines[self._current].attempt(candidate, most_ms)

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        known = {each.candidate: each.attempt for each in self._sweeps[self._current].measured}
        sound = [each for each in candidates if known[each].failure is None]
        for each in sound:
            self._compile(each)
        timed = iter(self._machines[self._current].confirm(sound, rounds, seed, fresh=fresh))
        return [next(timed) if each in sound else known[each] for each in candidates]

    def _compile(self, candidate: Candidate) -> Attempt | None:
        """Takes its time; returns the failure of what is not known or does not compile."""
        sweep, machine = self._sweeps[self._current], self._machines[self._current]
        measured = next((each for each in sweep.measured if each.candidate == candidate), None)
        if measured is None:
            return Attempt(Failure.UNAVAILABLE, "the sweep has not measured it")
        if measured.compiled is None:
            return None
        if (self._current, candidate) not in self._compiled:
            self._compiled.add((self._current, candidate))
            future = machine.submit(self._current[0], candidate.implementation, self._current[1], candidate.config)
            machine.wait([future], 1.0)
        return None if measured.compiled.failure is None else measured.attempt

    def close(self) -> None: ...


def unhindered(real: Op[Any]) -> Op[Any]:
    """The op with implementations that count as available, whatever is installed here: a sweep answers for them."""
    made: Op[Any] = Op(real.name, real.problem, real.reference, real.direction, family=real.family)
    for name, each in real.implementations.items():
        made.implementations[name] = dataclasses.replace(each, op=made, available=lambda device: True)
    return made


def bench_of(sweeps: Sequence[Sweep]) -> tuple[Bench, Machines]:
    """The GPU and the software that these sweeps were recorded with, and the machines that answer for it."""
    first, machines = sweeps[0], Machines(sweeps)
    known = {name: unhindered(op) for name, op in ops.ops().items()}
    environment = first.header["environment"]
    return Bench(first.device, environment, lambda mode: machines, lambda: machines.now, lambda: known), machines


def bench(paths: Iterable[Path]) -> Bench:
    """The GPU that these sweeps, or those in these folders, were recorded on. Raises UsageError where they are of
    several GPUs or made with several versions."""
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    sweeps = [read(file) for file in files]
    if not sweeps:
        raise UsageError("there is no recorded sweep")
    first = sweeps[0]
    for each in sweeps:
        if each.device != first.device or each.header["environment"] != first.header["environment"]:
            raise UsageError("the sweeps are of several GPUs, or were made with several versions")
    return bench_of(sweeps)[0]
