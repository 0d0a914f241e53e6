"""Records as they lie in the tables, read whole, many at a time, and checked: None stands for each that is damaged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from tilebook.registry.checks import DAMAGE, config_of, quoted, time_text
from tilebook.registry.codec import miss_from, trial_from, verdict_like
from tilebook.registry.quick import Line, quick
from tilebook.registry.records import Miss, Trial
from tilebook.registry.sql import Row, Sql
from tilebook.registry.texts import Written
from tilebook.registry.wanted import Wanted

_T = TypeVar("_T")

BATCH = 256  # verdicts that are in memory at once


# Outer joins: a row whose partner is gone must be counted as damaged rather than vanish.
_PLACE = """
LEFT JOIN problem AS p ON p.id = {0}.problem_id LEFT JOIN device AS d ON d.id = {0}.device_id
"""
JOINS = f"""{_PLACE}
LEFT JOIN kernel AS k ON k.id = {{0}}.kernel_id LEFT JOIN environment AS e ON e.id = {{0}}.environment_id
"""
"""To the rows that a verdict or a trial shares with others; to be filled in with the name of its own."""

_VERDICTS = f"""
SELECT v.id, v.sha256, v.served, p.op, p.key, d.name, d.arch, d.sm_count, e.versions, k.op, k.digest, v.status,
       v.mode, v.default_time_ms, v.speedup, v.speedup_low, v.speedup_high, v.sources, v.origin, v.trusted,
       v.created_at, v.notes
FROM verdict AS v {JOINS.format("v")} WHERE v.id IN"""
_FINALISTS = """
SELECT verdict_id, place, implementation, config, time_ms, code, predicted_ms, is_default, speedup, speedup_low,
       speedup_high, samples_ms, again
FROM finalist WHERE verdict_id IN"""
_TRIALS = f"""
SELECT t.id, p.op, p.key, d.name, d.arch, d.sm_count, e.versions, k.op, k.digest, t.implementation, t.config, t.status,
       t.time_ms, t.created_at, t.failure, t.reason, t.samples_ms, t.facts, t.sha256
FROM trial AS t {JOINS.format("t")}
"""
_MISSES = f"""
SELECT m.id, p.op, p.key, d.name, d.arch, d.sm_count, m.calls, m.time_ms, m.last_seen, m.sha256
FROM miss AS m {_PLACE.format("m")}
"""
_DEVICES = "SELECT id, name, arch, sm_count FROM device"


def verdicts(sql: Sql, wanted: Wanted) -> Iterator[tuple[int, Written | None]]:
    """Those that are wanted, in the order of their keys, and the ids of their rows."""
    return _batches(sql, wanted, _verdict)


def lines(sql: Sql, wanted: Wanted) -> Iterator[tuple[int, Line | None]]:
    """`verdicts`, as lines of the exchange format, which takes a third of the time."""
    return _batches(sql, wanted, line_of)


def lines_of(sql: Sql, batch: Sequence[int]) -> Iterator[tuple[int, Line | None]]:
    """The lines of the verdicts of these rows, in this order."""
    return _in_order(batch, _by_id(sql, batch, line_of))


def trials(sql: Sql, wanted: Wanted, origin: str | None = None) -> Iterator[tuple[int, Trial | None]]:
    """Likewise, as they were recorded."""
    if (condition := condition_of(sql, wanted, "t", origin)) is None:
        return
    where, values = condition
    for number, *row in sql.each(f"{_TRIALS} {where} ORDER BY t.id", values):
        yield number, _or_none(_trial, row)


def trial_ids(sql: Sql, wanted: Wanted) -> Iterator[int]:
    """The ids of the trials that are wanted, by op, problem and time."""
    if (condition := condition_of(sql, wanted, "t")) is None:
        return
    where, values = condition
    order = f"p.op{sql.by_bytes}, p.key{sql.by_bytes}, t.created_at"
    statement = f"SELECT t.id FROM trial AS t {JOINS.format('t')} {where} ORDER BY {order}"
    yield from (int(number) for (number,) in sql.each(statement, values))


def trials_of(sql: Sql, batch: Sequence[int]) -> Iterator[tuple[int, Trial | None]]:
    """The trials of these rows, in this order."""
    rows = sql.among(f"{_TRIALS} WHERE t.id IN", batch)
    return _in_order(batch, {number: _or_none(_trial, row) for number, *row in rows})


def misses(sql: Sql, wanted: Wanted) -> Iterator[tuple[int, Miss | None]]:
    """Likewise; they are of no kernel."""
    if (condition := condition_of(sql, wanted, "m")) is None:
        return
    where, values = condition
    for number, *row in sql.each(f"{_MISSES} {where} ORDER BY m.id", values):
        yield number, _or_none(_miss, row)


def condition_of(sql: Sql, wanted: Wanted, row: str, origin: str | None = None) -> tuple[str, list[Any]] | None:
    """The WHERE of the rows that are wanted, called `row` and joined as by JOINS, with its values; None where there are
    none."""
    given = {"p.op": wanted.op, "p.key": wanted.problem, "k.digest": wanted.kernel, f"{row}.origin": origin}
    conditions = [f"{column} = ?" for column, value in given.items() if value is not None]
    values: list[Any] = [value for value in given.values() if value is not None]
    if wanted.device is not None or wanted.gpu:
        devices = [number for number, *device in sql.rows(_DEVICES) if wanted.is_on(device)]
        if not devices:
            return None
        conditions.append(f"{row}.device_id IN ({', '.join('?' * len(devices))})")
        values += devices
    return f"WHERE {' AND '.join(conditions)}" if conditions else "", values


class Same:
    """A verdict that is there as it is to be."""


def known(sql: Sql, wanted: Mapping[int, str]) -> dict[int, Written | Same | None]:
    """The verdicts of these rows; None for each that is damaged, `Same` for one that has the digest beside its id."""

    def read(row: Row, finalists: list[Row]) -> Written | Same | None:
        if row[1] == wanted[row[0]] and line_of(row, finalists) is not None:
            return Same()
        return _verdict(row, finalists)

    return _by_id(sql, wanted, read)


def _by_id(sql: Sql, of: Iterable[int], read: Callable[[Row, list[Row]], _T]) -> dict[int, _T]:
    numbers = list(of)
    finalists: dict[int, list[Row]] = {}
    for row in sql.among(_FINALISTS, numbers):
        finalists.setdefault(row[0], []).append(row)
    return {row[0]: read(row, finalists.get(row[0], [])) for row in sql.among(_VERDICTS, numbers)}


def _batches(sql: Sql, wanted: Wanted, read: Callable[[Row, list[Row]], _T | None]) -> Iterator[tuple[int, _T | None]]:
    every = ids(sql, wanted)
    while batch := list(itertools.islice(every, BATCH)):
        yield from _in_order(batch, _by_id(sql, batch, read))


def _in_order(batch: Iterable[int], found: Mapping[int, _T]) -> Iterator[tuple[int, _T]]:
    return ((number, found[number]) for number in batch if number in found)


def ids(sql: Sql, wanted: Wanted) -> Iterator[int]:
    """The ids of the verdicts that are wanted, in the order of their keys."""
    if (condition := condition_of(sql, wanted, "v")) is None:
        return
    where, values = condition
    bytewise = sql.by_bytes
    order = f"p.op{bytewise}, p.key{bytewise}, d.name{bytewise}, d.arch{bytewise}, d.sm_count, k.digest{bytewise}"
    statement = f"SELECT v.id FROM verdict AS v {JOINS.format('v')} {where} ORDER BY {order}, v.id"
    yield from (int(number) for (number,) in sql.each(statement, values))


def _or_none(decode: Callable[..., _T], *values: Any) -> _T | None:
    """None where the row is damaged."""
    try:
        return decode(*values)
    except DAMAGE:
        return None


def _verdict(row: Row, finalists: list[Row]) -> Written | None:
    return _or_none(_checked, row, finalists)


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
    _, sha256, served, *keys = row[:11]
    status, mode, default_time_ms, value, low, high, sources, origin, trusted, created_at, notes = row[11:]
    ranked = sorted(finalists, key=lambda each: each[1])
    content = {
        **_keys(*keys),
        "status": status,
        "finalists": [_finalist(each, place) for place, each in enumerate(ranked)],
        "default_time_ms": default_time_ms,
        "interval": None if value is None and low is None and high is None else [value, low, high],
        "mode": mode,
        "sources": json.loads(sources),
        "notes": json.loads(notes),
        "created_at": _time(created_at),
    }
    written = Written(verdict_like(content, origin=origin, trusted=_flag(trusted)))
    if (written.sha256, written.served) != (sha256, served):
        raise ValueError("a digest is wrong")
    return written


def _keys(op: Any, problem: Any, name: Any, arch: Any, sms: Any, versions: Any, of: Any, digest: Any) -> dict[str, Any]:
    if op != of:
        raise ValueError("the problem and the kernel belong to different ops")
    device = {"name": name, "arch": arch, "sm_count": sms}
    return {"op": op, "problem": problem, "device": device, "environment": json.loads(versions), "kernel": digest}


def _time(value: Any) -> Any:
    """PostgreSQL gives times, SQLite the texts that they are stored as."""
    return time_text(value) if isinstance(value, datetime) else value


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


def _trial(row: Row) -> Trial:
    implementation, config, status, time_ms, created_at, failure, reason, samples_ms, facts, sha256 = row[8:]
    trial = trial_from(
        {
            **_keys(*row[:8]),
            "implementation": implementation,
            "config": config_of(config),
            "status": status,
            "time_ms": time_ms,
            "created_at": _time(created_at),
            "failure": failure,
            "reason": reason,
            "samples_ms": json.loads(samples_ms),
            "facts": json.loads(facts),
        }
    )
    if trial.sha256 != sha256:
        raise ValueError("the digest is wrong")
    return trial


def _miss(row: Row) -> Miss:
    op, problem, name, arch, sm_count, calls, time_ms, last_seen, sha256 = row
    device = {"name": name, "arch": arch, "sm_count": sm_count}
    fields = {"op": op, "problem": problem, "device": device, "calls": calls, "time_ms": time_ms}
    miss = miss_from({**fields, "last_seen": _time(last_seen)})
    if miss.sha256 != sha256:
        raise ValueError("the digest is wrong")
    return miss
