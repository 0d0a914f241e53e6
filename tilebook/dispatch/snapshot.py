"""What the registry's layers say about one GPU model, read once: from verdicts to choices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

from tilebook import device as devices
from tilebook import registry as store
from tilebook.device import Device
from tilebook.dispatch.choice import Choice
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.registry.current import may_run, stands

FARTHEST = 8.0
"""A verdict serves problems up to this distance: a factor of 256 in one dimension, or less in several."""

_THIN = 1.05
"""In an environment other than the verdict's, a winner must have beaten what PyTorch runs by at least this factor."""

_DECISIVE = ("torch", "cudnn", "cuda")
"""Packages whose versions decide how fast PyTorch's own call is."""


class Snapshot:
    """The verdicts for one GPU model and the revocations, read once and kept in memory."""

    def __init__(self, gpu: Device, explicit: str | None = None) -> None:
        self.gpu = gpu
        self._verdicts: dict[str, list[tuple[str, store.Verdict, Problem]]] = {}
        try:
            layers = store.Layers.default(explicit)
            found, revoked = layers.read(device=store.Device(*gpu.identity))
            problems = list(layers.problems)
        except Exception as broken:  # whatever is wrong with it, training goes on
            found, revoked, problems = [], [], [f"the registry cannot be read: {broken}"]
        self._raw = found
        self._denied = store.DenyList(revoked, devices.package_version("triton"))
        if problems:
            told = f"tilebook: {'; '.join(problems)}; other registries serve, and default configs are used beside"
            warnings.warn(told, RuntimeWarning, stacklevel=2)

    def verdicts(self, op: Op[Any]) -> list[tuple[str, store.Verdict, Problem]]:
        """The verdicts that may be served for this op: trusted, and made with the kernels as they are now."""
        if op.name not in self._verdicts:
            kept = []
            for layer, verdict in self._raw:
                if verdict.op == op.name and verdict.trusted and stands(verdict, op.digest):
                    try:
                        kept.append((layer, verdict, op.problem.from_key(verdict.problem)))
                    except (TypeError, ValueError):
                        continue
            self._verdicts[op.name] = kept
        return self._verdicts[op.name]

    def choose(self, op: Op[Any], problem: Problem) -> Choice:
        """The exact verdict's winner; PyTorch's own where it has a kernel for this; else the nearest, the default."""
        return next(choice for choice in self.candidates(op, problem) if self.revocation(choice) is None)

    def default(self, op: Op[Any], problem: Problem) -> Choice:
        """What runs where no verdict serves: PyTorch's kernel where it has one, else ours with its default config."""
        if op.fused(problem):
            return pytorch(op, problem, self.gpu)
        return next(choice for choice in self._defaults(op, problem) if self.revocation(choice) is None)

    def revocation(self, choice: Choice) -> store.Revocation | None:
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
        for layer, verdict, _ in found:
            if verdict.problem == problem.key:
                for candidate in self._feasible(op, problem, verdict):
                    if self._counts(candidate[0], problem, verdict):
                        yield Choice(*candidate, "exact", problem, self.gpu, layer, verdict)
        if op.fused(problem):
            # Faster than PyTorch's own kernel only where that was measured: a neighbour's verdict is no evidence.
            yield pytorch(op, problem, self.gpu)
        near = sorted(
            ((problem.distance(p), not v.measured, layer, v) for layer, v, p in found if v.problem != problem.key),
            key=lambda each: each[:2],
        )
        for distance, _, layer, verdict in near:
            if distance > FARTHEST:
                break
            for candidate in self._feasible(op, problem, verdict):
                yield Choice(*candidate, "nearest", problem, self.gpu, layer, verdict)
        yield from self._defaults(op, problem)

    def _counts(self, candidate: Implementation, problem: Problem, verdict: store.Verdict) -> bool:
        """Does an exact verdict say of this finalist how it compares here with what PyTorch's own call would do?

        A prediction compares our configs with each other only. In another environment PyTorch's own may have become
        faster, so that a thin margin over it no longer counts.
        """
        op = candidate.op
        if not op.fused(problem):
            return True
        if not verdict.measured:
            return False
        then, now = verdict.environment.versions, devices.environment()
        if all(then.get(package, now.get(package)) == now.get(package) for package in _DECISIVE):
            return True
        times = _times(verdict)
        native = [ms for name, ms in times.items() if op.native(name, problem, self.gpu)]
        its = times.get(candidate.name, verdict.time_ms)
        return not native or its is None or min(native) >= _THIN * its

    def _feasible(
        self, op: Op[Any], problem: Problem, verdict: store.Verdict
    ) -> Iterator[tuple[Implementation, Config | None]]:
        """The candidates of a verdict that can run this problem here, best first, but those whose source changed."""
        for name, values in verdict.ranking():
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
            for layer, verdict, _ in self.verdicts(op):
                for candidate in self._feasible(op, problem, verdict) if verdict.measured else ():
                    if candidate[0] is ours:
                        yield Choice(*candidate, "default", problem, self.gpu, layer)
            for config in configs:
                yield Choice(ours, config, "default", problem, self.gpu)
        yield pytorch(op, problem, self.gpu)


def pytorch(op: Op[Any], problem: Problem, gpu: Device | None = None) -> Choice:
    """PyTorch's own implementation, which runs everywhere."""
    return Choice(op.implementations["torch"], None, "fallback", problem, gpu)


def _times(verdict: store.Verdict) -> dict[str, float]:
    """Milliseconds of each implementation's best finalist."""
    found: dict[str, float] = {}
    for each in verdict.finalists:
        if each.time_ms is not None:
            found[each.implementation] = min(each.time_ms, found.get(each.implementation, math.inf))
    return found
