"""Keeping a registry in order: what is damaged is found and set aside, what nobody needs any more is removed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tilebook.errors import RegistryError
from tilebook.registry import merging, reading, sqlitefile
from tilebook.registry.checks import DAMAGE, quoted, sources, time_text
from tilebook.registry.filewriter import WAIT_S
from tilebook.registry.selection import Selection
from tilebook.registry.sql import Sql
from tilebook.registry.target import Target
from tilebook.registry.wanted import ANY
from tilebook.registry.wanted import Wanted as Place

NAMED_BY: Mapping[str, Sequence[str]] = {
    "problem": ("trial", "verdict", "miss"),
    "device": ("trial", "verdict", "miss"),
    "environment": ("trial", "verdict"),
    "kernel": ("trial", "verdict"),
}
"""The tables of what records share, and those whose rows name one of theirs."""

PARTS = ("position", "finalist")
"""The tables of what verdicts are made of."""


class Opened(Protocol):
    """What of a registry is asked for here: `Registry` has it, and of a file `FileReader` and `FileWriter`."""

    def transaction(self) -> AbstractContextManager[Sql]: ...


@dataclass(frozen=True)
class Found:
    """A verdict or a trial that may be removed: what says whether it is wanted any more.

    implementation: a verdict's winner. sources: as `Verdict.sources`; nothing of a trial.
    """

    id: int
    op: str
    device: str
    kernel: str
    implementation: str
    sources: Mapping[str, str] = field(default_factory=dict)

    def source_of(self, implementation: str) -> str:
        """The digest of the source that this implementation had; the op's kernel where the verdict has no other."""
        return self.sources.get(implementation, self.kernel)


Retired = Callable[[Found], bool]


@dataclass(frozen=True)
class Chosen:
    """What is to be removed."""

    verdicts: Sequence[Found] = ()
    trials: Sequence[Found] = ()

    def __bool__(self) -> bool:
        return bool(self.verdicts or self.trials)


@dataclass(frozen=True)
class Wanted:
    """What is to be removed: verdicts, trials or both that a selection fits.

    retired: what says of a verdict, and of a trial, that it is of kernels as they were; then only those go.
    """

    selection: Selection
    verdicts: bool = True
    trials: bool = True
    retired: tuple[Retired, Retired] | None = None


def choose(registry: Opened, wanted: Sequence[Wanted]) -> Chosen:
    """What `remove` would remove."""
    with registry.transaction() as sql:
        return _choose(sql, wanted)


def remove(registry: Opened, wanted: Sequence[Wanted]) -> Chosen:
    """Removes what fits any of these, in one transaction; returns what it was. Revocations and the ledger stay."""
    with registry.transaction() as sql:
        chosen = _choose(sql, wanted)
        merging.remove(sql, [each.id for each in chosen.verdicts])
        sql.delete("trial", "id", [each.id for each in chosen.trials])
    return chosen


def tidy(registry: Opened) -> int:
    """Removes the problems, devices, kernels and environments that no record names any more; returns how many."""
    removed = 0
    with registry.transaction() as sql:
        for table, others in NAMED_BY.items():
            unnamed = (f"NOT EXISTS (SELECT 1 FROM {other} WHERE {table}_id = {table}.id)" for other in others)
            removed += sql.run(f"DELETE FROM {table} WHERE {' AND '.join(unnamed)}")
    return removed


def shrink(target: str) -> int:
    """Gives a SQLite file's unused pages back to the file system; returns the bytes. Raises RegistryError."""
    path = Target.parse(target).path
    if path is None:
        return 0
    before = path.stat().st_size
    with (
        sqlitefile.explained(path),
        contextlib.closing(sqlitefile.connect(path, "rw", WAIT_S)) as connection,
    ):
        sqlitefile.refuse_foreign_schema(connection, path)
        connection.execute("VACUUM")
    return before - path.stat().st_size


def repair(registry: Opened, aside: Path) -> int:
    """Moves the damaged rows of a registry to the file `aside`, which must not exist; returns how many.

    Those are the trials, verdicts and misses that readers leave out. The file has a line of JSON for each, to be looked
    at; nothing reads it back. Where nothing is damaged, it is not made. Damaged revocations stay: what they revoked may
    run again, and whoever wrote them decides, see `Registry.unrevoke`. Raises RegistryError.
    """
    with registry.transaction() as sql:
        damaged = {
            "trial": _lost(reading.trials(sql, ANY)),
            "verdict": _lost(reading.lines(sql, ANY)),
            "miss": _lost(reading.misses(sql, ANY)),
        }
        rows = [_spelled(sql, table, number) for table, ids in damaged.items() for number in ids]
        _set_aside(rows, aside)
        merging.remove(sql, damaged["verdict"])
        for table in ("trial", "miss"):
            sql.delete(table, "id", damaged[table])
    with registry.transaction() as sql:
        for table in PARTS:  # of verdicts that are not there
            sql.run(f"DELETE FROM {table} WHERE verdict_id NOT IN (SELECT id FROM verdict)")
        sql.mend_indexes()
    return len(rows)


def _lost(rows: Iterator[tuple[int, object | None]]) -> list[int]:
    return [number for number, record in rows if record is None]


def _set_aside(rows: Sequence[Mapping[str, Any]], aside: Path) -> None:
    if not rows:
        return
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise RegistryError(f"damaged rows cannot be set aside in {aside}: {error.strerror}") from error


def _choose(sql: Sql, wanted: Sequence[Wanted]) -> Chosen:
    verdicts: dict[int, Found] = {}
    trials: dict[int, Found] = {}
    for each in wanted:
        for kind, found, query, place in (
            (each.verdicts, verdicts, _verdicts, 0),
            (each.trials, trials, _trials, 1),
        ):
            rows = query(sql, each.selection) if kind else ()
            found.update((row.id, row) for row in rows if each.retired is None or each.retired[place](row))
    return Chosen(list(verdicts.values()), list(trials.values()))


# A damaged row may lack its partners.
_NAMED = "{0}.id, coalesce(p.op, ''), coalesce(d.name, ''), coalesce(k.digest, '')"
_VERDICTS = f"""
SELECT {_NAMED.format("v")}, coalesce(f.implementation, ''), v.sources
FROM verdict AS v {reading.JOINS.format("v")} LEFT JOIN finalist AS f ON f.verdict_id = v.id AND f.place = 0
"""
_TRIALS = f"SELECT {_NAMED.format('t')}, t.implementation FROM trial AS t {reading.JOINS.format('t')}"


def _verdicts(sql: Sql, selection: Selection) -> Iterator[Found]:
    found = _selected(sql, _VERDICTS, "v", selection, "v.status <> 'predicted'")
    for number, op, device, kernel, implementation, its in found:
        yield Found(number, op, device, kernel, implementation, _sources(its))


def _trials(sql: Sql, selection: Selection) -> Iterator[Found]:
    for row in _selected(sql, _TRIALS, "t", selection, "t.time_ms IS NOT NULL"):
        yield Found(*row)


def _selected(sql: Sql, statement: str, row: str, selection: Selection, measured: str) -> Sequence[Sequence[Any]]:
    """The rows that a selection fits, by the condition too, where it leaves predictions out."""
    place = Place(op=selection.op, gpu=selection.gpu)
    if (condition := reading.condition_of(sql, place, row, selection.origin)) is None:
        return ()
    where, values = condition
    conditions = [where.removeprefix("WHERE ")] if where else []
    if selection.dtype is not None:  # keys are canonical JSON
        conditions.append("p.key LIKE ? ESCAPE '/'")
        values.append(f'%"dtype":"{_literal(selection.dtype)}"%')
    for moment, sign in ((selection.since, ">="), (selection.before, "<")):
        if moment is not None:
            conditions.append(f"{row}.created_at {sign} ?")
            values.append(sql.time(moment))
    if selection.measured:
        conditions.append(measured)
    return sql.rows(f"{statement} WHERE {' AND '.join(conditions)}" if conditions else statement, values)


def _literal(text: str) -> str:
    """A text that stands for itself in a pattern of LIKE."""
    return text.replace("/", "//").replace("%", "/%").replace("_", "/_")


def _sources(value: str) -> Mapping[str, str]:
    try:
        return sources(json.loads(value))
    except DAMAGE:
        return {}


def _spelled(sql: Sql, table: str, number: int) -> dict[str, Any]:
    """A row as it stands, with the rows that are part of it or that it shares."""
    (row,) = sql.named(f"SELECT * FROM {table} WHERE id = ?", [number])
    found = _told(table, row)
    for other, named_by in NAMED_BY.items():
        if table in named_by:
            for partner in sql.named(f"SELECT * FROM {other} WHERE id = ?", [row[f"{other}_id"]]):
                found[other] = _told("", partner)
    if table == "verdict":
        parts = sql.named("SELECT * FROM finalist WHERE verdict_id = ? ORDER BY place", [number])
        found["finalists"] = [_told("finalist", each) for each in parts]
    return found


def _told(table: str, row: Mapping[str, Any]) -> dict[str, Any]:
    named = {"table": table} if table else {}
    return {**named, **{name: _plain(value) for name, value in row.items()}}


def _plain(value: object) -> object:
    """A value as JSON has it: of what JSON has not, a number that is not finite or bytes, how Python writes it."""
    if isinstance(value, datetime):
        return time_text(value)
    plain = isinstance(value, int | str | None) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else quoted(value)
