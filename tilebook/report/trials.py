"""Trials as rows: for JSON, and for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilebook.errors import one_line
from tilebook.registry.records import Trial
from tilebook.report.rows import label


def trial_row(trial: Trial, layer: str) -> dict[str, Any]:
    """One trial as plain data; times in milliseconds, null where nothing was measured."""
    return {
        "op": trial.op,
        "problem": label(trial.op, trial.problem),
        "device": trial.device.name,
        "implementation": trial.implementation,
        "config": dict(trial.config),
        "status": trial.status.value,
        "failure": None if trial.failure is None else trial.failure.value,
        "reason": trial.reason,
        "time_ms": trial.time_ms,
        "layer": layer,
        "made": trial.facts.get("made"),
        "tried_at": trial.created_at.isoformat(),
    }


def trial_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people, a problem after the other, the fastest first, then what failed."""
    if not rows:
        return "no trial fits"
    by_problem: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in rows:
        by_problem.setdefault((each["op"], each["problem"], each["device"]), []).append(each)
    lines = []
    for (op, problem, device), its in sorted(by_problem.items()):
        lines.append(f"{op} {problem} on {device}")
        lines += [f"  {_line(each)}" for each in sorted(its, key=_slowness)]
    return "\n".join(lines)


def _slowness(each: dict[str, Any]) -> tuple[bool, bool, float]:
    return each["status"] != "ok", each["time_ms"] is None, each["time_ms"] or 0.0


def _line(each: dict[str, Any]) -> str:
    time = "–" if each["time_ms"] is None else f"{each['time_ms']:.4g} ms"
    config = " ".join(f"{axis}={value}" for axis, value in each["config"].items())
    why = "" if each["failure"] is None else f"  {each['failure']}: {one_line(each['reason'])}"
    return f"{time:>10}  {each['implementation']} {config}".rstrip() + why.rstrip(": ")
