"""Verdicts as they were before the schema of evidence (exchange format 1 and 2, database schema 1 and 2).

Their evidence was one free-form JSON object. What the tuner wrote there becomes finalists, sources and notes; what has
another form was never written by it, and is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tilebook.registry.checks import DAMAGE, Json, canonical, fields, quoted, time_text
from tilebook.registry.codec import verdict_from
from tilebook.registry.verdict import Verdict

FIELDS = (
    "op",
    "problem",
    "device",
    "environment",
    "kernel",
    "status",
    "implementation",
    "config",
    "time_ms",
    "default_time_ms",
    "speedup",
    "speedup_low",
    "speedup_high",
    "evidence",
    "created_at",
)

# Runs on SQLite and PostgreSQL. A row whose partner is gone must be counted as damaged rather than vanish.
ROWS = """
SELECT p.op, p.key, d.name, d.arch, d.sm_count, e.versions, k.op, k.digest, v.status, v.implementation, v.config,
       v.time_ms, v.default_time_ms, v.speedup, v.speedup_low, v.speedup_high, v.evidence, v.created_at, v.origin,
       v.trusted, v.sha256
FROM verdict AS v
LEFT JOIN problem AS p ON p.id = v.problem_id LEFT JOIN device AS d ON d.id = v.device_id
LEFT JOIN kernel AS k ON k.id = v.kernel_id LEFT JOIN environment AS e ON e.id = v.environment_id
ORDER BY v.id
"""
IDS = "SELECT problem_id, device_id, environment_id, kernel_id FROM verdict ORDER BY id"


def verdict_or_none(row: Sequence[Any]) -> Verdict | None:
    """The verdict of a row of ROWS; None where the row is damaged."""
    try:
        return _verdict(row)
    except DAMAGE:
        return None


def _verdict(row: Sequence[Any]) -> Verdict:
    op, problem, name, arch, sm_count, versions, kernel_op, kernel, *values = row
    status, implementation, config, time_ms, default_ms, speedup, low, high, evidence, created_at, *rest = values
    origin, trusted, sha256 = rest
    if op != kernel_op:
        raise ValueError("the problem and the kernel belong to different ops")
    content = {
        "op": op,
        "problem": problem,
        "device": {"name": name, "arch": arch, "sm_count": sm_count},
        "environment": json.loads(versions),
        "kernel": kernel,
        "status": status,
        "implementation": implementation,
        "config": json.loads(config),
        "time_ms": time_ms,
        "default_time_ms": default_ms,
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": high,
        "evidence": json.loads(evidence),
        "created_at": time_text(created_at) if isinstance(created_at, datetime) else created_at,
    }
    if trusted not in (0, 1):
        raise ValueError(f"not a flag: {quoted(trusted)}")
    whole = canonical({**content, "origin": origin, "trusted": bool(trusted)})
    if hashlib.sha256(whole.encode()).hexdigest() != sha256:
        raise ValueError("the digest is wrong")
    return verdict_from(lifted(content), origin=origin, trusted=bool(trusted))


def lifted(data: object) -> dict[str, Json]:
    """The portable content of a verdict of old, in today's form. Raises ValueError where it has not the old one."""
    old = fields(data, "verdict", FIELDS)
    notes = dict(_mapping(old["evidence"], "evidence"))
    measured = old["status"] != "predicted"
    mode, sources = notes.pop("mode", "graph"), notes.pop("kernels", {})
    finalists = _finalists(old, _objects(notes.pop("candidates", []), "candidates"), notes.pop("predicted_ms", None))
    _add_second_contests(finalists, notes.pop("again", []))
    interval = [old["speedup"], old["speedup_low"], old["speedup_high"]]
    return {
        **{name: old[name] for name in ("op", "problem", "device", "environment", "kernel", "status", "created_at")},
        "finalists": finalists,
        "default_time_ms": old["default_time_ms"],
        "interval": None if interval == [None] * 3 else interval,
        "mode": mode if measured or mode != "predicted" else "graph",
        "sources": {name: source for name, source in _mapping(sources, "kernels").items() if source != ""},
        "notes": notes,
    }


def _finalists(old: Mapping[str, Any], candidates: list[dict[str, Any]], predicted_ms: Any) -> list[dict[str, Any]]:
    """The winner first. The default was the first candidate of a contest, and is what won where none beat it."""
    won = old["implementation"], canonical(old["config"])
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for place, each in enumerate(candidates):
        made = _finalist(each)
        made["default"] = old["status"] != "predicted" and place == 0 and made["time_ms"] == old["default_time_ms"]
        found.setdefault((made["implementation"], canonical(made["config"])), made)
    winner = found.pop(won, None)
    if winner is None:
        winner = _finalist({"implementation": old["implementation"], "config": old["config"]})
        winner["default"] = old["status"] == "default" and not candidates and old["time_ms"] == old["default_time_ms"]
    winner["time_ms"] = old["time_ms"]
    if old["status"] == "predicted" and winner["predicted_ms"] is None:
        winner["predicted_ms"] = predicted_ms
    rest = sorted(found.values(), key=lambda each: _ms(each))
    return [winner, *rest]


def _finalist(each: Mapping[str, Any]) -> dict[str, Any]:
    known = {"implementation", "config", "time_ms", "speedup", "samples_ms", "predicted_ms", "code"}
    if not {"implementation", "config"} <= each.keys() <= known or not isinstance(each["implementation"], str):
        raise ValueError(f"a candidate of the evidence is not one: {quoted(each)}")
    _mapping(each["config"], "config")
    made = {"time_ms": None, "speedup": None, "samples_ms": [], "predicted_ms": None, "code": "", **each}
    return {**made, "again": None, "default": False}


def _ms(each: Mapping[str, Any]) -> float:
    times = (each["time_ms"], each["predicted_ms"])
    return next((float(ms) for ms in times if isinstance(ms, int | float)), float("inf"))


def _add_second_contests(finalists: list[dict[str, Any]], contests: object) -> None:
    """Each was of the default, then the one that it was compared with, if that passed once more."""
    if not isinstance(contests, list):
        raise ValueError(f"again is not a list: {quoted(contests)}")
    by_key = {(each["implementation"], canonical(each["config"])): each for each in finalists}
    for contest in contests:
        rows = [_finalist(each) for each in _objects(contest, "again")]
        if len(rows) == 2 and (found := by_key.get((rows[1]["implementation"], canonical(rows[1]["config"])))):
            found["again"] = {
                "speedup": rows[1]["speedup"],
                "samples_ms": rows[1]["samples_ms"],
                "default_samples_ms": rows[0]["samples_ms"],
            }


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is not an object: {quoted(value)}")
    return value


def _objects(value: object, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{what} of the evidence is not a list of objects")
    return value
