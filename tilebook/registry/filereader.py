"""Whole records of a SQLite registry, with the standard library alone: for commands that only read.

`Registry` reads the same, and PostgreSQL too; to import SQLAlchemy takes longer than to read all that ships.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tilebook.errors import RegistryError
from tilebook.registry import legacy, served, sqlitefile
from tilebook.registry.checks import DAMAGE, called, config_of, quoted, time_text
from tilebook.registry.codec import miss_from, trial_from, verdict_from
from tilebook.registry.columns import all_revocations, revocation_in
from tilebook.registry.damage import Damage
from tilebook.registry.readers import lost_revocation
from tilebook.registry.records import Device, Miss, Revocation, Trial
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Target
from tilebook.registry.verdict import Verdict
from tilebook.registry.wanted import Wanted

if TYPE_CHECKING:
    from tilebook.registry.store import Registry

WAIT_S = 1.0
"""How long a reader waits for a writer's lock."""

_NONE: tuple[float, list[dict[str, Any] | None]] = (math.inf, [])

_Record = TypeVar("_Record", Trial, Verdict, Miss)


class FileReader(Damage):
    """A SQLite registry, opened for reading: what `Registry` promises of its readers holds.

    It is one reading: all that is asked for until it is closed is of one state of the file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, schema: int, cleanup: ExitStack) -> None:
        super().__init__(str(path))
        self.schema = schema
        self._path, self._connection, self._cleanup = path, connection, cleanup

    @classmethod
    def open(cls, path: Path, wait_s: float = WAIT_S) -> Self:
        """Raises RegistryError as `Registry.open` does."""
        with sqlitefile.explained(path), ExitStack() as opening:
            place = opening.enter_context(sqlitefile.readable(path))
            connection = sqlitefile.connect(place, "ro", wait_s)
            opening.callback(connection.close)
            connection.create_function("called", 2, lambda gpu, name: called(gpu, str(name)), deterministic=True)
            sqlitefile.begin(connection)
            sqlitefile.refuse_foreign_schema(connection, path)
            schema = sqlitefile.check_version(connection, path, OLDEST_READABLE, SCHEMA_VERSION)
            if not sqlitefile.tables_of(schema) <= sqlitefile.tables(connection):
                raise RegistryError(f"registry {path} is corrupt: its tables are not those of a tilebook registry")
            damage = sqlitefile.damage(connection, place)
            reading = cls(path, connection, schema, opening.pop_all())
        if damage:
            reading.note(f"the file is damaged ({damage}); rows may be missing")
        return reading

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def verdicts(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        kernel: str | None = None,
        gpu: str | None = None,
    ) -> list[Verdict]:
        """Those that match, in the order of their keys. gpu: words of the GPU's name, see `checks.called`."""
        found = self.intact(record for _, record in self.each_verdict(op, problem, device, kernel, gpu))
        return sorted(found, key=lambda verdict: verdict.place)

    def trials(
        self,
        *,
        op: str | None = None,
        device: Device | None = None,
        origin: str | None = None,
        gpu: str | None = None,
    ) -> list[Trial]:
        """Those that match, oldest first."""
        return self.intact(record for _, record in self.each_trial(op, device, origin, gpu))

    def misses(self, *, device: Device | None = None) -> list[Miss]:
        """The ledger, heaviest first: calls times the GPU time of a call."""
        found = self.intact(record for _, record in self.each_miss(device))
        return sorted(found, key=lambda miss: (-miss.calls * miss.time_ms, miss.op, miss.problem, miss.device.name))

    def revocations(self) -> list[Revocation]:
        """All of them, oldest first; the untrusted ones too."""
        rows = self.rows(all_revocations(self.schema), ()) if self.schema > 1 else ()
        found = [(str(row[1]), revocation_in(row)) for row in rows]
        lost = [scope for scope, revocation in found if revocation is None]
        self.corrupt = len(lost)
        for scope in lost:
            self.note(lost_revocation(scope))
        intact = [revocation for _, revocation in found if revocation is not None]
        return sorted(intact, key=lambda each: (each.created_at, each.scope))

    def empty(self) -> bool:
        """Has it neither verdicts nor trials nor revocations?"""
        tables = ("verdict", "trial", *(("revocation",) if self.schema > 1 else ()))
        return not any(list(self.rows(f"SELECT 1 FROM {table} LIMIT 1", ())) for table in tables)

    def each_verdict(
        self,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        kernel: str | None = None,
        gpu: str | None = None,
    ) -> Iterator[tuple[int, Verdict | None]]:
        """The rows that match one by one, with their ids; None for one that is damaged, or a finalist of which is."""
        if self.schema < 3:
            wanted = Wanted(op, problem, device, kernel, gpu)
            for number, row in enumerate(self.rows(legacy.ROWS, ()), start=1):
                verdict = legacy.verdict_or_none(row)
                if verdict is None or wanted.has(verdict):
                    yield number, verdict
            return
        where, values = where_clause("v", op, problem, device, kernel, gpu=gpu)
        finalists = self._finalists(where, values)
        place, its = next(finalists, _NONE)
        for row in self.rows(f"{_VERDICTS} {where} ORDER BY v.id", values):
            while place < row[0]:
                place, its = next(finalists, _NONE)
            yield row[0], _verdict(row, its if place == row[0] else [])

    def each_trial(
        self,
        op: str | None = None,
        device: Device | None = None,
        origin: str | None = None,
        gpu: str | None = None,
    ) -> Iterator[tuple[int, Trial | None]]:
        """As `each_verdict`."""
        where, values = where_clause("t", op, None, device, None, origin, gpu)
        for number, *row in self.rows(f"{TRIALS} {where} ORDER BY t.id", values):
            yield number, trial_in(row)

    def each_miss(self, device: Device | None = None) -> Iterator[tuple[int, Miss | None]]:
        """As `each_verdict`."""
        where, values = where_clause("m", None, None, device, None)
        for number, *row in self.rows(f"{_MISSES} {where} ORDER BY m.id", values):
            yield number, _miss(row)

    def structure(self, most: int = 10) -> list[str]:
        """What SQLite finds wrong with the file's pages and indexes, and with what rows refer to: the first of it."""
        with sqlitefile.explained(self._path):
            found = [
                quoted(line).strip("'\"") for (line,) in self._connection.execute(f"PRAGMA integrity_check({most})")
            ]
            lost = self._connection.execute("PRAGMA foreign_key_check").fetchmany(most)
        return [line for line in found if line != "ok"] + [
            f"row {number} of {quoted(table)} refers to one of {quoted(other)} that is not there"
            for table, number, other, _ in lost
        ]

    def _finalists(self, where: str, values: Sequence[Any]) -> Iterator[tuple[float, list[dict[str, Any] | None]]]:
        """By verdict, in the order of their places; None for one that is damaged, or stands in another's place."""
        rows = self.rows(f"{_FINALISTS} {where} ORDER BY f.verdict_id, f.place", values)
        for verdict, its in itertools.groupby(rows, key=operator.itemgetter(0)):
            yield verdict, [_finalist(row[2:]) if row[1] == place else None for place, row in enumerate(its)]

    def rows(self, query: str, values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """The rows of a query, which are those of a stranger's tables. Raises RegistryError."""
        with sqlitefile.explained(self._path):
            yield from self._connection.execute(query, values)


def reader(target: str) -> FileReader | Registry:
    """A registry opened for reading, a file the quicker way. Raises RegistryError."""
    path = Target.parse(target).path
    if path is not None:
        return FileReader.open(path)
    from tilebook.registry.store import Registry

    return Registry.open(target)


# Outer joins: a row whose partner cannot be found is damaged, and must be counted rather than vanish.
_SHARED = """
LEFT JOIN problem AS p ON p.id = {0}.problem_id LEFT JOIN device AS d ON d.id = {0}.device_id
"""
_BOTH = f"""{_SHARED}
LEFT JOIN environment AS e ON e.id = {{0}}.environment_id LEFT JOIN kernel AS k ON k.id = {{0}}.kernel_id
"""
_KEYS = "p.op, p.key, d.name, d.arch, d.sm_count, e.versions, k.op, k.digest"
_VERDICTS = f"""
SELECT v.id, {_KEYS}, v.status, v.default_time_ms, v.speedup, v.speedup_low, v.speedup_high, v.mode, v.sources, v.notes,
       v.created_at, v.origin, v.trusted, v.sha256, v.served
FROM verdict AS v {_BOTH.format("v")}
"""
_FINALISTS = f"""
SELECT f.verdict_id, f.place, f.implementation, f.config, f.time_ms, f.speedup, f.speedup_low, f.speedup_high,
       f.samples_ms, f.again, f.predicted_ms, f.code, f.is_default
FROM finalist AS f JOIN verdict AS v ON v.id = f.verdict_id {_BOTH.format("v")}
"""
TRIALS = f"""
SELECT t.id, {_KEYS}, t.implementation, t.config, t.status, t.time_ms, t.created_at, t.failure, t.reason, t.samples_ms,
       t.facts, t.sha256
FROM trial AS t {_BOTH.format("t")}
"""
_MISSES = f"""
SELECT m.id, p.op, p.key, d.name, d.arch, d.sm_count, m.calls, m.time_ms, m.last_seen, m.sha256
FROM miss AS m {_SHARED.format("m")}
"""


def where_clause(
    table: str,
    op: str | None,
    problem: str | None,
    device: Device | None,
    kernel: str | None,
    origin: str | None = None,
    gpu: str | None = None,
) -> tuple[str, list[Any]]:
    """The condition and its values."""
    given: list[tuple[str, Sequence[Any]]] = []
    if op is not None:
        given.append(("p.op = ?", [op]))
    if problem is not None:
        given.append(("p.key = ?", [problem]))
    if kernel is not None:
        given.append(("k.digest = ?", [kernel]))
    if origin is not None:
        given.append((f"{table}.origin = ?", [origin]))
    if device is not None:
        given.append(("(d.name, d.arch, d.sm_count) = (?, ?, ?)", [device.name, device.arch, device.sm_count]))
    if gpu:
        given.append(("d.id IN (SELECT id FROM device WHERE called(?, name))", [gpu]))
    clause = " AND ".join(condition for condition, _ in given)
    return f"WHERE {clause}" if given else "", [value for _, values in given for value in values]


def _keys(op: Any, problem: Any, name: Any, arch: Any, sms: Any, versions: Any, of: Any, digest: Any) -> dict[str, Any]:
    if op != of:
        raise ValueError("the problem and the kernel belong to different ops")
    device = {"name": name, "arch": arch, "sm_count": sms}
    return {"op": op, "problem": problem, "device": device, "environment": json.loads(versions), "kernel": digest}


def _speedup(values: Sequence[Any]) -> list[Any] | None:
    return None if all(each is None for each in values) else list(values)


def _or_none(decode: Callable[..., _Record]) -> Callable[..., _Record | None]:
    """None where the row is damaged."""

    def decoded(*values: Any) -> _Record | None:
        try:
            return decode(*values)
        except DAMAGE:
            return None

    return decoded


@_or_none
def _verdict(row: Sequence[Any], finalists: Sequence[dict[str, Any] | None]) -> Verdict:
    status, default_ms, *interval = row[9:14]
    mode, sources, notes, created_at, origin, trusted, sha256, of_served = row[14:]
    verdict = verdict_from(
        {
            **_keys(*row[1:9]),
            "status": status,
            "finalists": list(finalists),
            "default_time_ms": default_ms,
            "interval": _speedup(interval),
            "mode": mode,
            "sources": json.loads(sources),
            "notes": json.loads(notes),
            "created_at": created_at,
        },
        origin=origin,
        trusted=bool(trusted),
    )
    if (verdict.sha256, served.digest(verdict)) != (sha256, of_served):
        raise ValueError("the digest is wrong")
    return verdict


def _finalist(columns: Sequence[Any]) -> dict[str, Any] | None:
    implementation, config, time_ms, *speedup, samples_ms, again, predicted_ms, code, is_default = columns
    try:
        return {
            "implementation": implementation,
            "config": json.loads(config),
            "time_ms": time_ms,
            "speedup": _speedup(speedup),
            "samples_ms": json.loads(samples_ms),
            "again": json.loads(again),
            "predicted_ms": predicted_ms,
            "code": code,
            "default": bool(is_default),
        }
    except DAMAGE:
        return None


@_or_none
def trial_in(row: Sequence[Any]) -> Trial:
    """The trial of the columns of TRIALS but the first; None where they are damaged."""
    implementation, config, status, time_ms, created_at, failure, reason, samples_ms, facts, sha256 = row[8:]
    trial = trial_from(
        {
            **_keys(*row[:8]),
            "implementation": implementation,
            "config": config_of(config),
            "status": status,
            "time_ms": time_ms,
            "created_at": time_text(created_at) if isinstance(created_at, datetime) else created_at,
            "failure": failure,
            "reason": reason,
            "samples_ms": json.loads(samples_ms),
            "facts": json.loads(facts),
        }
    )
    if trial.sha256 != sha256:
        raise ValueError("the digest is wrong")
    return trial


@_or_none
def _miss(row: Sequence[Any]) -> Miss:
    op, problem, name, arch, sm_count, calls, time_ms, last_seen, sha256 = row
    device = {"name": name, "arch": arch, "sm_count": sm_count}
    fields = {"op": op, "problem": problem, "device": device, "calls": calls, "time_ms": time_ms}
    miss = miss_from({**fields, "last_seen": last_seen})
    if miss.sha256 != sha256:
        raise ValueError("the digest is wrong")
    return miss
