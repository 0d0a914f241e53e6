"""What the registry's layers say about one GPU model: from verdicts to choices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

from tilebook import device as devices
from tilebook.device import Device
from tilebook.dispatch.choice import Choice
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.registry import serving
from tilebook.registry.current import may_run, stands
from tilebook.registry.layers import DenyList
from tilebook.registry.records import Device as Known
from tilebook.registry.records import Revocation
from tilebook.registry.serving import Served

FARTHEST = 8.0
"""A verdict serves problems up to this distance: a factor of 256 in one dimension, or less in several."""

_THIN = 1.05
"""In an environment other than the verdict's, a winner must have beaten what PyTorch runs by at least this factor."""

_DECISIVE = ("torch", "cudnn", "cuda")
"""Packages whose versions decide how fast PyTorch's own call is."""


class Snapshot:
    """The verdicts for one GPU model, read op by op and kept in memory, and the revocations, read at once.

    A layer that another process has locked is asked again with the next problem. What is wrong with a layer is warned
    of once, and the others serve.
    """

    def __init__(self, gpu: Device, explicit: str | None = None) -> None:
        self.gpu = gpu
        self._verdicts: dict[str, list[tuple[Served, Problem]]] = {}
        self._warned: set[str] = set()
        try:
            self._table = serving.read(*gpu.identity, explicit)
        except Exception as broken:  # whatever is wrong with it, training goes on
            self._table = serving.Table((), Known(*gpu.identity))
            self._table.problems.append(f"the registry cannot be read: {broken}")
        self._denied = self._deny()
        self._warn()

    def verdicts(self, op: Op[Any]) -> list[tuple[Served, Problem]]:
        """The verdicts that may be served for this op: trusted, and made with the kernels as they are now."""
        if op.name not in self._verdicts:
            kept = []
            for verdict in self._table.verdicts(op.name):
                if verdict.trusted and stands(verdict, op.digest):
                    try:
                        kept.append((verdict, op.problem.from_key(verdict.problem)))
                    except (TypeError, ValueError):
                        continue
            self._verdicts[op.name] = kept
            self._denied = self._deny()  # a layer that was locked may have told its revocations only now
            self._warn()
        return self._verdicts[op.name]

    def _deny(self) -> DenyList:
        return DenyList(self._table.revocations, devices.package_version("triton"))

    def _warn(self) -> None:
        problems = [each for each in self._table.problems if each not in self._warned]
        self._warned.update(problems)
        if problems:
            rest = "the verdicts that can be read serve; without one run PyTorch's own functions and default configs"
            told = f"tilebook: {'; '.join(problems)}; {rest}"
            warnings.warn(told, RuntimeWarning, stacklevel=3)

    def choose(self, op: Op[Any], problem: Problem) -> Choice:
        """The exact verdict's winner; PyTorch's own where it has a kernel for this; else the nearest, the default."""
        if self._table.locked:
            self._verdicts.clear()
        return next(choice for choice in self.candidates(op, problem) if self.revocation(choice) is None)

    def default(self, op: Op[Any], problem: Problem) -> Choice:
        """What runs where no verdict serves: PyTorch's kernel where it has one, else ours with its default config."""
        if op.fused(problem):
            return pytorch(op, problem, self.gpu)
        return next(choice for choice in self._defaults(op, problem) if self.revocation(choice) is None)

    def revocation(self, choice: Choice) -> Revocation | None:
        """Why a choice may not run, or None where it may."""
        implementation = choice.implementation
        op = implementation.op
        if op.name not in self._denied.ops:
            return None  # before its source is asked for, which may not be here
        kernel = implementation.digest
        return self._denied.find(op.name, kernel, self.gpu.arch, implementation.name, choice.config or {})

    def candidates(self, op: Op[Any], problem: Problem) -> Iterator[Choice]:
        """All that can run this problem here, revoked or not, best first; PyTorch's own implementation ends it."""
        found = self.verdicts(op)
        for verdict, _ in found:
            if verdict.problem == problem.key:
                for candidate in self._feasible(op, problem, verdict):
                    if self._counts(candidate[0], problem, verdict):
                        yield Choice(*candidate, "exact", problem, self.gpu, verdict.layer, verdict)
        if op.fused(problem):
            # Faster than PyTorch's own kernel only where that was measured: a neighbour's verdict is no evidence.
            yield pytorch(op, problem, self.gpu)
        near = sorted(
            ((problem.distance(p), not v.measured, v) for v, p in found if v.problem != problem.key),
            key=lambda each: each[:2],
        )
        for distance, _, verdict in near:
            if distance > FARTHEST:
                break
            for candidate in self._feasible(op, problem, verdict):
                yield Choice(*candidate, "nearest", problem, self.gpu, verdict.layer, verdict)
        yield from self._defaults(op, problem)

    def _counts(self, candidate: Implementation, problem: Problem, verdict: Served) -> bool:
        """Does an exact verdict say of this finalist how it compares here with what PyTorch's own call would do?

        A prediction compares our configs with each other only. In another environment PyTorch's own may have become
        faster, so that a thin margin over it no longer counts.
        """
        op = candidate.op
        if not op.fused(problem):
            return True
        if not verdict.measured:
            return False
        then, now = verdict.environment, devices.environment()
        if all(then.get(package, now.get(package)) == now.get(package) for package in _DECISIVE):
            return True
        times = _times(verdict)
        native = [ms for name, ms in times.items() if op.native(name, problem, self.gpu)]
        its = times.get(candidate.name, verdict.finalists[0].time_ms)
        return not native or its is None or min(native) >= _THIN * its

    def _feasible(
        self, op: Op[Any], problem: Problem, verdict: Served
    ) -> Iterator[tuple[Implementation, Config | None]]:
        """The candidates of a verdict that can run this problem here, best first, but those whose source changed."""
        for finalist in verdict.finalists:
            name, values = finalist.implementation, finalist.config
            implementation = op.implementations.get(name)
            if implementation is None or not implementation.can_run(problem, self.gpu):
                continue
            if not may_run(verdict, name, implementation.digest):
                continue
            space = implementation.space
            if space is None:
                yield implementation, None
                continue
            # One that won before it had a space ran as it does by default now.
            config = Config(values) if values else space.default(problem, self.gpu)
            if space.contains(config) and space.reject(problem, config, self.gpu) is None:
                yield implementation, config

    def _defaults(self, op: Op[Any], problem: Problem) -> Iterator[Choice]:
        """Our kernel with its default config; in its place configs verified on other problems, then its neighbours."""
        ours = op.tunable
        if ours.can_run(problem, self.gpu) and ours.space is not None and ours.proven(problem):
            configs = ours.space.defaults(problem, self.gpu)
            yield Choice(ours, next(configs), "default", problem, self.gpu)
            for verdict, _ in self.verdicts(op):
                for candidate in self._feasible(op, problem, verdict) if verdict.measured else ():
                    if candidate[0] is ours:
                        yield Choice(*candidate, "default", problem, self.gpu, verdict.layer)
            for config in configs:
                yield Choice(ours, config, "default", problem, self.gpu)
        yield pytorch(op, problem, self.gpu)


def pytorch(op: Op[Any], problem: Problem, gpu: Device | None = None) -> Choice:
    """PyTorch's own implementation, which runs everywhere."""
    return Choice(op.implementations["torch"], None, "fallback", problem, gpu)


def _times(verdict: Served) -> dict[str, float]:
    """Milliseconds of each implementation's best finalist."""
    found: dict[str, float] = {}
    for each in verdict.finalists:
        if each.time_ms is not None:
            found[each.implementation] = min(each.time_ms, found.get(each.implementation, math.inf))
    return found
