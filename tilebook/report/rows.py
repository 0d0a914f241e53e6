"""Verdicts as rows: for JSON, and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from tilebook import device as devices
from tilebook import op as ops
from tilebook.registry import Verdict


def stale(verdict: Verdict) -> list[str]:
    """The versions that differ between the verdict's environment and this one; none where no GPU is here to serve."""
    here = devices.environment() if devices.present() else {}
    return [
        f"{name} {version} → {here[name]}"
        for name, version in sorted(verdict.environment.versions.items())
        if name in here and here[name] != version and name not in ("python", "tilebook")
    ]


def _label(verdict: Verdict) -> str:
    try:
        problem = ops.get(verdict.op).problem.from_key(verdict.problem)
        return f"{problem.label} {getattr(problem, 'dtype', '')}".strip()
    except (ops.UsageError, TypeError, ValueError):
        return verdict.problem  # an op or a field that this version does not know


def row(verdict: Verdict, layer: str) -> dict[str, Any]:
    """One verdict as plain data; times in milliseconds, null where nothing was measured."""
    others = verdict.evidence.get("candidates")
    return {
        "op": verdict.op,
        "problem": _label(verdict),
        "device": verdict.device.name,
        "implementation": verdict.implementation,
        "config": dict(verdict.config),
        "status": verdict.status.value,
        "time_ms": verdict.time_ms,
        "default_time_ms": verdict.default_time_ms,
        "speedup": verdict.speedup,
        "speedup_low": verdict.speedup_low,
        "speedup_high": verdict.speedup_high,
        "predicted_ms": verdict.evidence.get("predicted_ms"),
        "predicted_default_ms": verdict.evidence.get("predicted_default_ms"),
        "layer": layer,
        "stale": bool(stale(verdict)),
        "trusted": verdict.trusted,
        "tried": verdict.evidence.get("tried"),
        "rejected": verdict.evidence.get("rejected"),
        "infeasible": verdict.evidence.get("infeasible"),
        "seconds": verdict.evidence.get("seconds"),
        "others": _others(others if isinstance(others, list) else []),
        "measured_at": verdict.created_at.isoformat(),
    }


def _others(candidates: Sequence[Any]) -> dict[str, float]:
    """ms of each implementation that has no space, by name."""
    return {
        c["implementation"]: c["time_ms"] for c in candidates if not c.get("config") and c.get("time_ms") is not None
    }


def table(rows: Sequence[dict[str, Any]], stream: TextIO, tuned: bool = False) -> None:
    """Prints rows for people: who wins, by how much, how sure, and what lost."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, width=None if stream.isatty() else 180, highlight=False)
    if not rows:
        console.print("no verdicts: run `tilebook tune` first")
        return
    devices_named = sorted({str(each["device"]) for each in rows})
    title = f"{'tuned for' if tuned else 'verdicts for'} {', '.join(devices_named)}"
    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("op", "problem"):
        grid.add_column(name, no_wrap=True)
    for name in ("default ms", "winner ms", "speed-up [95 %]"):
        grid.add_column(name, justify="right", no_wrap=True)
    grid.add_column("winner")
    grid.add_column("others ms")
    grid.add_column("tried / rejected")
    grid.add_column("status")
    for each in rows:
        grid.add_row(*_cells(each))
    console.print(grid)
    if any(each["status"] == "predicted" for each in rows):
        console.print("~ predicted by a performance model from the compiled code; nothing was measured.")


def _ms(value: float | None, mark: str = "") -> str:
    return "–" if value is None else f"{mark}{value:.4g}"


def _cells(each: dict[str, Any]) -> list[str]:
    predicted = each["status"] == "predicted"
    if predicted:
        default_ms, winner_ms = _ms(each["predicted_default_ms"], "~"), _ms(each["predicted_ms"], "~")
        ratio = "–"
    else:
        default_ms, winner_ms = _ms(each["default_time_ms"]), _ms(each["time_ms"])
        ratio = "1 (default wins)"
        if each["status"] == "measured":
            ratio = f"{each['speedup']:.3f} [{each['speedup_low']:.3f}, {each['speedup_high']:.3f}]"
    config = " ".join(f"{axis}={value}" for axis, value in each["config"].items())
    rejected = ", ".join(f"{count} {reason}" for reason, count in (each["rejected"] or {}).items())
    flags = [each["status"], each["layer"]]
    flags += ["stale"] if each["stale"] else []
    flags += [] if each["trusted"] else ["not trusted"]
    return [
        each["op"],
        each["problem"],
        default_ms,
        winner_ms,
        ratio,
        f"{each['implementation']} {config}".strip(),
        ", ".join(f"{name} {time_ms:.4g}" for name, time_ms in each["others"].items()),
        f"{each['tried'] if each['tried'] is not None else '–'} / {rejected or 0}",
        ", ".join(flags),
    ]
