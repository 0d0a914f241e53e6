"""Verdicts as they lie in the tables, read whole, many at a time, and checked; damaged ones are counted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

from tilebook.registry.checks import DAMAGE, config_of, quoted, time_text
from tilebook.registry.codec import verdict_like
from tilebook.registry.quick import Line, quick
from tilebook.registry.sql import Row, Sql
from tilebook.registry.texts import Written
from tilebook.registry.wanted import Wanted

_T = TypeVar("_T")

BATCH = 256  # verdicts that are in memory at once


# A row whose partner is gone must be counted as damaged rather than vanish.
_ROWS = """
SELECT v.id, v.sha256, v.served, p.op, p.key, d.name, d.arch, d.sm_count, e.versions, k.op, k.digest, v.status,
       v.mode, v.default_time_ms, v.speedup, v.speedup_low, v.speedup_high, v.sources, v.origin, v.trusted,
       v.created_at, v.notes
FROM verdict AS v
LEFT JOIN problem AS p ON p.id = v.problem_id LEFT JOIN device AS d ON d.id = v.device_id
LEFT JOIN kernel AS k ON k.id = v.kernel_id LEFT JOIN environment AS e ON e.id = v.environment_id
WHERE v.id IN"""
_FINALISTS = """
SELECT verdict_id, place, implementation, config, time_ms, code, predicted_ms, is_default, speedup, speedup_low,
       speedup_high, samples_ms, again
FROM finalist WHERE verdict_id IN"""


def verdicts(sql: Sql, wanted: Wanted) -> Iterator[Written | None]:
    """Those that are wanted, in the order of their keys; None for each that is damaged."""
    ids = _ids(sql, wanted)
    while batch := list(itertools.islice(ids, BATCH)):
        found = by_id(sql, batch)
        yield from (found[number] for number in batch if number in found)


def lines(sql: Sql, wanted: Wanted) -> Iterator[Line | None]:
    """`verdicts`, as lines of the exchange format."""
    ids = _ids(sql, wanted)
    while batch := list(itertools.islice(ids, BATCH)):
        found = _by_id(sql, batch, line_of)
        yield from (found[number] for number in batch if number in found)


class Same:
    """A verdict that is there as it is to be."""


def known(sql: Sql, wanted: Mapping[int, str]) -> dict[int, Written | Same | None]:
    """The verdicts of these rows; None for each that is damaged, `Same` for one that has the digest beside its id."""

    def read(row: Row, finalists: list[Row]) -> Written | Same | None:
        if row[1] == wanted[row[0]] and line_of(row, finalists) is not None:
            return Same()
        return _verdict(row, finalists)

    return _by_id(sql, wanted, read)


def by_id(sql: Sql, ids: Iterable[int]) -> dict[int, Written | None]:
    """The verdicts of these rows; None for each that is damaged."""
    return _by_id(sql, ids, _verdict)


def _by_id(sql: Sql, ids: Iterable[int], read: Callable[[Row, list[Row]], _T]) -> dict[int, _T]:
    numbers = list(ids)
    finalists: dict[int, list[Row]] = {}
    for row in sql.among(_FINALISTS, numbers):
        finalists.setdefault(row[0], []).append(row)
    return {row[0]: read(row, finalists.get(row[0], [])) for row in sql.among(_ROWS, numbers)}


def _ids(sql: Sql, wanted: Wanted) -> Iterator[int]:
    conditions: list[str] = []
    values: list[Any] = []
    if wanted.op is not None:
        conditions.append("p.op = ?")
        values.append(wanted.op)
    if wanted.problem is not None:
        conditions.append("p.key = ?")
        values.append(wanted.problem)
    if wanted.kernel is not None:
        conditions.append("k.digest = ?")
        values.append(wanted.kernel)
    if wanted.device is not None or wanted.gpu is not None:
        devices = [number for number, *device in sql.rows(_DEVICES) if wanted.is_on(device)]
        if not devices:
            return
        conditions.append(f"v.device_id IN ({', '.join('?' * len(devices))})")
        values += devices
    bytewise = sql.by_bytes
    order = f"p.op{bytewise}, p.key{bytewise}, d.name{bytewise}, d.arch{bytewise}, d.sm_count, k.digest{bytewise}"
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    statement = f"""
        SELECT v.id FROM verdict AS v LEFT JOIN problem AS p ON p.id = v.problem_id
        LEFT JOIN device AS d ON d.id = v.device_id LEFT JOIN kernel AS k ON k.id = v.kernel_id
        {where} ORDER BY {order}, v.id
    """
    yield from (int(number) for (number,) in sql.each(statement, values))


_DEVICES = "SELECT id, name, arch, sm_count FROM device"


def _verdict(row: Row, finalists: list[Row]) -> Written | None:
    try:
        return _checked(row, finalists)
    except DAMAGE:
        return None


def line_of(row: Row, finalists: list[Row]) -> Line | None:
    """A verdict's line, the quick way where that sees that the row is what was recorded; None where it is damaged."""
    try:
        ranked = sorted(finalists, key=lambda each: each[1])
    except TypeError:
        return None
    if (found := quick(row, ranked)) is not None:
        return found
    written = _verdict(row, ranked)
    return None if written is None else Line.of(written)


def _checked(row: Row, finalists: list[Row]) -> Written:
    _, sha256, served, op, problem, name, arch, sm_count, versions, kernel_op, kernel, *rest = row
    status, mode, default_time_ms, value, low, high, sources, origin, trusted, created_at, notes = rest
    if op != kernel_op:
        raise ValueError("the problem and the kernel belong to different ops")
    ranked = sorted(finalists, key=lambda each: each[1])
    content = {
        "op": op,
        "problem": problem,
        "device": {"name": name, "arch": arch, "sm_count": sm_count},
        "environment": json.loads(versions),
        "kernel": kernel,
        "status": status,
        "finalists": [_finalist(each, place) for place, each in enumerate(ranked)],
        "default_time_ms": default_time_ms,
        "interval": None if value is None and low is None and high is None else [value, low, high],
        "mode": mode,
        "sources": json.loads(sources),
        "notes": json.loads(notes),
        "created_at": time_text(created_at) if isinstance(created_at, datetime) else created_at,
    }
    written = Written(verdict_like(content, origin=origin, trusted=_flag(trusted)))
    if (written.sha256, written.served) != (sha256, served):
        raise ValueError("a digest is wrong")
    return written


def _finalist(row: Row, place: int) -> dict[str, Any]:
    _, at, implementation, config, time_ms, code, predicted_ms, default, value, low, high, samples_ms, again = row
    if at != place:
        raise ValueError("a finalist is missing")
    return {
        "implementation": implementation,
        "config": config_of(config),
        "time_ms": time_ms,
        "speedup": None if value is None and low is None and high is None else [value, low, high],
        "samples_ms": () if samples_ms == "[]" else json.loads(samples_ms),
        "again": None if again == "null" else json.loads(again),
        "predicted_ms": predicted_ms,
        "code": code,
        "default": _flag(default),
    }


def _flag(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError(f"not a flag: {quoted(value)}")
    return bool(value)
