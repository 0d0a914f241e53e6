"""Records into the tables, in the caller's transaction: many at a time, whatever there are, in memory for a few."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tilebook.registry import reading
from tilebook.registry.columns import all_revocations, revocation_columns, revocation_in, trial_columns
from tilebook.registry.near import position_columns
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.shared import Shared
from tilebook.registry.sql import Sql
from tilebook.registry.target import SCHEMA_VERSION
from tilebook.registry.texts import FINALIST, VERDICT, Columns, Record, Written, values
from tilebook.registry.verdict import Verdict

BATCH = 256  # records that go into the tables together
MOST_LINES = 1_000  # what a report says of single verdicts; of the others it counts


class Choice(NamedTuple):
    """Whether a new verdict takes an existing one's place, and why."""

    replace: bool
    why: str


Rule = Callable[[Verdict, Verdict], Choice]  # (existing, new)


@dataclass
class Merged:
    """What one `merge` did; `replaced` and `kept` hold one line per verdict that met another, MOST_LINES at most."""

    trials: int = 0
    verdicts: int = 0
    revocations: int = 0
    unchanged: int = 0
    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def note(lines: list[str], line: str) -> None:
    """Adds a line to a report that shows no more than MOST_LINES."""
    if len(lines) < MOST_LINES:
        lines.append(line)
    elif len(lines) == MOST_LINES:
        lines.append("and more that are not shown")


def pour(sql: Sql, records: Iterable[Record], rule: Rule, origin: str) -> Merged:
    """Stores what comes, in its order; `rule` decides between verdicts on one key, `origin` marks trials."""
    into = _Tables(sql, origin, rule)
    rest = iter(records)
    while batch := list(itertools.islice(rest, BATCH)):
        into.add_trials([each for each in batch if isinstance(each, Trial)])
        for distinct in _by_key([each for each in batch if isinstance(each, Written)]):
            into.add_verdicts(distinct)
        for each in batch:
            if isinstance(each, Revocation):
                _add_revocation(sql, each, into.merged)
    return into.merged


def _by_key(verdicts: Sequence[Written]) -> Iterator[list[Written]]:
    """The verdicts in their order, cut where a key comes a second time."""
    part: list[Written] = []
    seen: set[tuple[object, ...]] = set()
    for each in verdicts:
        told = each.told
        key = told.op, told.problem, told.device.text, told.kernel
        if key in seen:
            yield part
            part, seen = [], set()
        part.append(each)
        seen.add(key)
    if part:
        yield part


class _Tables:
    def __init__(self, sql: Sql, origin: str, rule: Rule) -> None:
        self._sql, self._origin, self._rule = sql, origin, rule
        self._shared = Shared(sql)
        self.merged = Merged()

    def add_trials(self, trials: Sequence[Trial]) -> None:
        if not trials:
            return
        keys = self._keys(trials)
        new = {}
        for key, each in zip(keys, trials, strict=True):
            row = {**key, **trial_columns(each, self._origin)}
            row["created_at"] = self._sql.time(each.created_at)
            new[row["sha256"]] = row
        known = {sha256 for (sha256,) in self._sql.among("SELECT sha256 FROM trial WHERE sha256 IN", new)}
        if self._origin == "local" and known:
            for sha256 in known:
                self._sql.run("UPDATE trial SET origin = ? WHERE sha256 = ?", [self._origin, sha256])
        rows = [row for sha256, row in new.items() if sha256 not in known]
        if rows:
            self._sql.insert("trial", rows[0], [list(row.values()) for row in rows])
        self.merged.trials += len(rows)

    def add_verdicts(self, verdicts: Sequence[Written]) -> None:
        """Of one key there is one at most."""
        keys = self._keys([each.told for each in verdicts])
        places = [(key["problem_id"], key["device_id"], key["kernel_id"]) for key in keys]
        there = self._there(places)
        digests = {there[place]: each.sha256 for each, place in zip(verdicts, places, strict=True) if place in there}
        known = reading.known(self._sql, digests)
        wins = []
        for each, key, place in zip(verdicts, keys, places, strict=True):
            if place not in there or self._replaces(known.get(there[place]), each):
                wins.append((each, key, place))
        remove(self._sql, [there[place] for _, _, place in wins if place in there])
        self._insert([(each, key) for each, key, _ in wins])

    def _there(self, places: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int, int], int]:
        """The ids of the verdicts that these keys have already."""
        wanted = set(places)
        statement = "SELECT problem_id, device_id, kernel_id, id FROM verdict WHERE problem_id IN"
        found = self._sql.among(statement, {place[0] for place in places})
        return {place: number for *ids, number in found if (place := tuple(ids)) in wanted}

    def _replaces(self, known: Written | reading.Same | None, new: Written) -> bool:
        """Does a verdict take the place of the one that is there? A damaged one gives way to any."""
        if known is None:
            return True
        if isinstance(known, reading.Same):
            self.merged.unchanged += 1
            return False
        existing, verdict = known.verdict, new.verdict
        choice = self._rule(existing, verdict)
        if known.portable == new.portable and not choice.replace:
            self.merged.unchanged += 1
            return False
        line = f"{verdict.op} {verdict.problem} on {verdict.device.name}: {choice.why}"
        note(self.merged.replaced if choice.replace else self.merged.kept, line)
        return choice.replace

    def _insert(self, verdicts: Sequence[tuple[Written, dict[str, int]]]) -> None:
        ids = self._sql.new_ids("verdict", len(verdicts))
        names: Sequence[str] = ()
        rows, finalists, positions = [], [], []
        for number, (each, key) in zip(ids, verdicts, strict=True):
            *told, created_at = values(each)
            names = names or ["id", *key, *VERDICT]
            rows.append((number, *key.values(), *told, self._sql.time_of(created_at)))
            finalists += [(number, place, *finalist) for place, finalist in enumerate(each.finalists)]
            if each.told.trusted:
                position = position_columns(each.told.problem).values()
                positions.append((number, key["device_id"], key["kernel_id"], *position))
        self._sql.insert("verdict", names, rows)
        self._sql.insert("finalist", ("verdict_id", "place", *FINALIST), finalists)
        self._sql.insert("position", ("verdict_id", "device_id", "kernel_id", "form", "spot"), positions)
        self.merged.verdicts += len(verdicts)

    def _keys(self, records: Sequence[Trial | Columns]) -> list[dict[str, int]]:
        """The ids of the rows that the records share with others."""
        shared = self._shared
        shared.find_problems({(each.op, each.problem) for each in records})
        return [
            {
                "problem_id": shared.problem(each.op, each.problem),
                "device_id": shared.device(each.device),
                "environment_id": shared.environment(each.environment),
                "kernel_id": shared.kernel(each.op, each.kernel),
            }
            for each in records
        ]


def remove(sql: Sql, verdicts: Iterable[int]) -> None:
    """Removes verdicts, by the ids of their rows, with all that is part of them."""
    ids = list(verdicts)
    for table, name in (("position", "verdict_id"), ("finalist", "verdict_id"), ("verdict", "id")):
        sql.delete(table, name, ids)


def _add_revocation(sql: Sql, revocation: Revocation, merged: Merged) -> None:
    rows = sql.rows(f"{all_revocations(SCHEMA_VERSION)} WHERE scope = ?", [revocation.scope])
    existing = revocation_in(rows[0]) if rows else None
    if existing is not None and not _goes_before(revocation, existing):
        merged.unchanged += 1
        return
    columns = {**revocation_columns(revocation), "created_at": sql.time(revocation.created_at)}
    if rows:
        sql.run("DELETE FROM revocation WHERE scope = ?", [revocation.scope])
    sql.insert("revocation", columns, [list(columns.values())])
    merged.revocations += 1


def _goes_before(new: Revocation, existing: Revocation) -> bool:
    """The trusted one of two stands, then one's own, then the first; whichever was merged first."""

    def rank(each: Revocation) -> tuple[object, ...]:
        return not each.trusted, each.origin == "imported", each.created_at, each.sha256

    return rank(new) < rank(existing)
