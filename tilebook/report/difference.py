"""What two registries say differently, as rows and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tilebook.registry.difference import KINDS, Difference
from tilebook.report.rows import label

if TYPE_CHECKING:
    from tilebook.registry.overview import Shown


def row(difference: Difference) -> dict[str, Any]:
    """A difference as plain data; null for the side that says nothing."""
    either = difference.either
    return {
        "kind": difference.kind,
        "op": either.op,
        "problem": label(either.op, either.problem),
        "device": either.device.name,
        "kernel": either.kernel,
        "ratio": difference.ratio,
        "a": _side(difference.a),
        "b": _side(difference.b),
    }


def _side(verdict: Shown | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {
        "implementation": verdict.implementation,
        "config": dict(verdict.config),
        "status": verdict.status.value,
        "time_ms": verdict.time_ms,
        "predicted_ms": verdict.winner.predicted_ms,
        "speedup": None if verdict.interval is None else verdict.interval.value,
        "trusted": verdict.trusted,
        "mode": verdict.mode,
        "environment": dict(verdict.environment.versions),
        "measured_at": verdict.created_at.isoformat(),
    }


def text(rows: Sequence[dict[str, Any]], a: str, b: str, of_a: int, of_b: int) -> str:
    """The rows for people. a, b: what the two are called; of_a, of_b: how many verdicts each has."""
    return "\n".join(_lines(rows, a, b, of_a, of_b))


def _lines(rows: Sequence[dict[str, Any]], a: str, b: str, of_a: int, of_b: int) -> Iterator[str]:
    yield f"A {a}: {of_a:,} verdicts"
    yield f"B {b}: {of_b:,} verdicts"
    for each in rows:
        if each["kind"] == "other trust":
            continue
        told = each["ratio"] if each["kind"] in ("other winner", "other time") else None
        ratio = f", B takes {told:.3f} times as long" if told else ""
        yield f"{each['kind']}: {each['op']} {each['problem']} on {each['device']}{ratio}"
        for name in ("a", "b"):
            if each[name] is not None:
                yield f"  {name.upper()} {_winner(each[name])}"
    yield from _trust(rows)
    counts = Counter(each["kind"] for each in rows)
    told = ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind])
    yield told or "no verdict differs"


def _trust(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each op and GPU: of what both sides say alike, how much only one trusts."""
    counts = Counter(
        (each["op"], each["device"], "A" if each["a"]["trusted"] else "B")
        for each in rows
        if each["kind"] == "other trust"
    )
    for (op, device, side), count in sorted(counts.items()):
        some = f"{count:,} verdict{'' if count == 1 else 's'}"
        yield f"other trust: {op} on {device}: {some} that only {side} trusts, with the same winners and times"


def _winner(side: dict[str, Any]) -> str:
    config = " ".join(f"{axis}={value}" for axis, value in side["config"].items())
    measured, predicted = side["time_ms"], side["predicted_ms"]
    time = f"{measured:.4g} ms" if measured is not None else f"~{predicted:.4g} ms" if predicted is not None else "–"
    notes = [side["status"], side["measured_at"][:10], *([] if side["trusted"] else ["not trusted"])]
    return f"{time}  {side['implementation']} {config}".rstrip() + f"  ({', '.join(notes)})"
