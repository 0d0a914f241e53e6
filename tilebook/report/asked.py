"""What model code has asked for on a GPU model, and what dispatch would run for it now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilebook import device as devices
from tilebook import op as ops
from tilebook import registry as store
from tilebook.device import Device
from tilebook.dispatch import Choice, Snapshot
from tilebook.op import Op, Problem, UsageError


@dataclass(frozen=True)
class Asked:
    """A problem that model code asked for when no verdict covered it, and what would run now.

    calls: so far. time_ms: of one call, by estimate.
    """

    op: Op[Any]
    problem: Problem
    calls: int
    time_ms: float
    choice: Choice

    @property
    def weight_s(self) -> float:
        """GPU time of all calls, by estimate."""
        return self.calls * self.time_ms / 1e3

    @property
    def exact(self) -> bool:
        """Has it a verdict of its own by now?"""
        return self.choice.source == "exact"

    @property
    def covered(self) -> bool:
        """Has it one that was measured?"""
        return self.exact and self.choice.verdict is not None and self.choice.verdict.measured

    @property
    def tunable(self) -> bool:
        """Does our kernel run it there?"""
        gpu, space = self.choice.gpu, self.op.tunable.space
        return gpu is not None and space is not None and self.op.tunable.can_run(self.problem, gpu)


def asked(gpu: Device, registry: str | None = None) -> list[Asked]:
    """The ledger for a GPU model, heaviest first. Ops and fields that this version does not know are left out."""
    snapshot, known = Snapshot(gpu, registry), ops.ops()
    layers = store.Layers.default(registry)
    found = []
    for miss in layers.misses(store.Device(*gpu.identity)):
        if miss.op in known:
            try:
                problem = known[miss.op].problem.from_key(miss.problem)
            except (TypeError, ValueError):
                continue
            choice = snapshot.choose(known[miss.op], problem)
            found.append(Asked(known[miss.op], problem, miss.calls, miss.time_ms, choice))
    return found


def target(gpu: str | None) -> Device:
    """The GPU here, where it is of that model or none is named; else the catalogue's. Raises UsageError without either.

    What is stored of the GPU here bears its own name, which may be longer than the catalogue's.
    """
    named = None if gpu is None else devices.find(gpu)
    if devices.present() and (named is None or devices.is_here(named, devices.current())):
        return devices.current()
    if named is None:
        raise UsageError("there is no GPU here: name a model, as in --gpu H200")
    return named
