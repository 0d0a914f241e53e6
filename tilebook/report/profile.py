"""What a program's processes have noted of their calls, put together: who takes the time, and what tuning may bring."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilebook import device as devices
from tilebook import op as ops
from tilebook.device import Device
from tilebook.dispatch import Choice, Snapshot
from tilebook.errors import UsageError
from tilebook.report.asked import Asked

ENOUGH = 0.95
"""The share of the dispatched time that is to have verdicts."""

_TOLD = ("calls", "time_ms", "timed", "waited", "served", "source", "covered", "promise", "tuned")

_MOST = 25  # problems in the text; the data has them all


@dataclass(frozen=True)
class Row(Asked):
    """A problem whose calls were seen, and what has run. `choice` is what would run now.

    timed: were calls of it timed? Else `time_ms` is the ledger's guess. waited: the GPU waited for the host in all of
    them, so that a call's time is the host's. promise: how many times as fast as PyTorch's own call what serves was
    when it was measured. tuned: how many times as fast as now it may be when it is tuned; 1 where it is. Both are None
    where nobody knows.
    """

    served: str
    source: str
    timed: bool
    waited: bool
    promise: float | None
    tuned: float | None


@dataclass(frozen=True)
class Profile:
    """rows: the heaviest first. seconds, steps: of all processes together. unfinished: of which nothing is known."""

    rows: Sequence[Row]
    seconds: float
    steps: int
    processes: int
    unfinished: int
    limited: bool

    @property
    def dispatched_s(self) -> float:
        return sum(each.weight_s for each in self.rows)

    @property
    def covered_s(self) -> float:
        return sum(each.weight_s for each in self.rows if each.covered)

    @property
    def step_ms(self) -> float | None:
        return 1e3 * self.seconds / self.steps if self.steps else None

    @property
    def gained(self) -> float:
        """How many times as fast as with PyTorch's own calls the span was, by the verdicts' evidence."""
        return 1 + sum(each.weight_s * ((each.promise or 1) - 1) for each in self.rows) / self.seconds

    @property
    def gain(self) -> float:
        """How many times as fast it may be when all is tuned of which something is known."""
        return self.seconds / (self.seconds - sum(each.weight_s * (1 - 1 / (each.tuned or 1)) for each in self.rows))

    def wanted(self) -> list[Row]:
        """What a tune is to take, heaviest first, until enough of the time has verdicts."""
        found, covered = [], self.covered_s
        for each in self.rows:
            if not each.covered and each.tunable and covered < ENOUGH * self.dispatched_s:
                found.append(each)
                covered += each.weight_s
        return found

    def data(self) -> dict[str, Any]:
        return {
            "processes": self.processes,
            "unfinished": self.unfinished,
            "seconds": self.seconds,
            "steps": self.steps,
            "step_ms": self.step_ms,
            "dispatched": self.dispatched_s / self.seconds,
            "covered": self.covered_s / self.dispatched_s if self.dispatched_s else None,
            "gained": self.gained,
            "gain": self.gain,
            "problems": [
                {
                    "op": each.op.name,
                    "problem": _label(each.problem),
                    "gpu": each.choice.gpu.name if each.choice.gpu else None,
                    "share": each.weight_s / self.seconds,
                    **{name: getattr(each, name) for name in _TOLD},
                }
                for each in self.rows
            ],
        }

    def text(self) -> str:
        whole = f"{self.steps:,} steps of {self.step_ms:.4g} ms" if self.step_ms else f"{self.seconds:.3g} s"
        several = f" of {self.processes} processes" if self.processes > 1 else ""
        lines = [
            f"{whole}{several}, {self.dispatched_s / self.seconds:.1%} of it in calls that dispatch sees",
            "   share    calls   ms a call  ms a step  over PyTorch   tuning",
        ]
        for each in self.rows[:_MOST]:
            sign = "≈" if not each.timed else "≤" if each.waited else " "
            step = f"{1e3 * each.weight_s / self.steps:.4g}" if self.steps else ""
            ahead = "unknown" if each.promise is None else f"{each.promise:.2f}x"
            tuned = "unknown" if each.tuned is None else "-" if each.tuned == 1 else f"{each.tuned:.2f}x"
            lines.append(
                f"  {each.weight_s / self.seconds:6.1%} {each.calls:>8,}  {sign}{each.time_ms:>9.4g}  {step:>9}"
                f"  {ahead:>12}  {tuned:>7}  {each.op.name} {_label(each.problem)}  ({each.served}, {each.source})"
            )
        lines += [f"  and {len(self.rows) - _MOST} more"] if len(self.rows) > _MOST else []
        unknown = sum(each.weight_s for each in self.rows if each.tuned is None) / self.seconds
        lines += [
            f"  verdicts cover {self.covered_s / self.dispatched_s:.0%} of the calls' time, and have made all of it"
            f" {self.gained:.3f}x as fast",
            f"  tuning may make it {self.gain:.3f}x as fast as now"
            + (f"; {unknown:.1%} is unknown" if unknown else ""),
        ]
        lines += [f"  {self.unfinished} processes could not say what they noted"] if self.unfinished else []
        return "\n".join(lines)


def together(written: Sequence[dict[str, Any]], registry: str | None) -> Profile:
    """What processes have written, put together, beside what the registry's layers say of it."""
    told = [each for each in written if each.get("problems")]
    summed: dict[tuple[str, str, tuple[Any, ...]], dict[str, Any]] = {}
    for each in (problem for process in told for problem in process["problems"] if problem["time_ms"] is not None):
        key = each["op"], each["problem"], tuple(each["gpu"])
        known = summed.setdefault(key, {**each, "calls": 0, "time_ms": 0.0})
        calls = known["calls"] + each["calls"]
        known["time_ms"] = (known["time_ms"] * known["calls"] + each["time_ms"] * each["calls"]) / calls
        known["calls"] = calls
    snapshot = functools.cache(lambda gpu: Snapshot(gpu, registry))
    rows = [_row(key[2], each, snapshot) for key, each in summed.items() if key[0] in ops.ops()]
    return Profile(
        sorted(rows, key=lambda row: -row.weight_s),
        sum(each["seconds"] for each in told),
        sum(each["steps"] for each in told),
        len(told),
        sum(each["state"] == "failed" for each in written),
        any(each["state"] == "limit" for each in written),
    )


def _label(problem: Any) -> str:
    return f"{problem.label} {getattr(problem, 'dtype', '')}".strip()


def _gpu(identity: tuple[Any, ...]) -> Device | None:
    if devices.present() and devices.current().identity == identity:
        return devices.current()
    try:
        return devices.find(identity[0]) if identity else None
    except UsageError:
        return None


def _row(identity: tuple[Any, ...], seen: dict[str, Any], snapshot_of: Any) -> Row:
    op, gpu = ops.get(seen["op"]), _gpu(identity)
    problem, served, source = op.problem.from_key(seen["problem"]), seen["served"], seen["source"]
    how = {name: seen[name] for name in ("calls", "time_ms", "served", "source", "timed", "waited")}
    if gpu is None:
        plain = Choice(op.implementations["torch"], None, "fallback", problem)
        return Row(op=op, problem=problem, choice=plain, promise=None, tuned=None, **how)
    snapshot = snapshot_of(gpu)
    choice, near = snapshot.choose(op, problem), snapshot.near(op, problem)
    row = Row(op=op, problem=problem, choice=choice, promise=None, tuned=None, **how)
    pytorchs, verdict = op.native(served, problem, gpu), choice.verdict if source in ("exact", "nearest") else None
    promise = 1.0 if pytorchs else snapshot.lead(op, verdict) if verdict is not None else None
    if row.covered or not row.tunable or (source == "nearest" and not pytorchs):
        return replace(row, promise=promise, tuned=1.0)
    if near is None:
        return replace(row, promise=promise)
    # Ours by default: the lead of a verdict's winner over that is its own.
    return replace(row, promise=promise, tuned=max(1.0, snapshot.lead(op, near) if pytorchs else near.speedup or 1.0))
