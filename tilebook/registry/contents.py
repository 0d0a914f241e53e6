"""What an open registry gives to read, by plain statements on SQLite and PostgreSQL alike. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

from tilebook.registry import legacy, reading
from tilebook.registry.columns import all_revocations, lost_revocation, revocation_in
from tilebook.registry.damage import Damage
from tilebook.registry.quick import Line
from tilebook.registry.records import Device, Miss, Revocation, Trial
from tilebook.registry.sql import Sql
from tilebook.registry.texts import Written
from tilebook.registry.verdict import Verdict
from tilebook.registry.wanted import ANY, Wanted

if TYPE_CHECKING:
    from tilebook.registry.lines import TrialLine
    from tilebook.registry.selection import Selection

_T = TypeVar("_T")


class Contents(Damage):
    """The records of a registry: what is read equals what was recorded.

    A row whose SHA-256 does not match is left out, counted in `corrupt` and logged; `problems` has a line for all that
    was found damaged. schema: the version of the one that it has.

    What begins with `each_` has few records in memory at once; until the last has been read, or the iterator is closed,
    nobody can write to a SQLite file.
    """

    schema: int

    def reading(self) -> AbstractContextManager[Sql]:
        """Statements of one state of the registry, whatever its schema."""
        raise NotImplementedError

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
        return [each.verdict for each in self.each_verdict(Wanted(op, problem, device, kernel, gpu))]

    def trials(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        kernel: str | None = None,
        origin: str | None = None,
    ) -> list[Trial]:
        """Those that match, oldest first. `origin` "local" leaves out those that only an import vouches for."""
        return list(self.each_trial(Wanted(op, problem, device, kernel), origin=origin))

    def misses(self, *, device: Device | None = None) -> list[Miss]:
        """The ledger, heaviest first: calls times the GPU time of a call."""
        found = self._intact(lambda sql: reading.misses(sql, Wanted(device=device)))
        return sorted(found, key=lambda miss: (-miss.calls * miss.time_ms, miss.op, miss.problem, miss.device.name))

    def revocations(self) -> list[Revocation]:
        """All of them, oldest first; the untrusted ones too."""
        with self.reading() as sql:
            # The table itself is asked for: a version may be wrong.
            rows = sql.rows(all_revocations(self.schema)) if sql.has("revocation") else ()
        found = [(str(row[1]), revocation_in(row)) for row in rows]
        lost = [scope for scope, revocation in found if revocation is None]
        self.corrupt = len(lost)
        for scope in lost:
            self.note(lost_revocation(scope))
        intact = [revocation for _, revocation in found if revocation is not None]
        return sorted(intact, key=lambda each: (each.created_at, each.scope))

    def each_verdict(self, wanted: Wanted = ANY) -> Iterator[Written]:
        """The verdicts that are wanted, in the order of their keys, and their texts."""
        if self.schema < 3:
            yield from self._old_verdicts(wanted)
        else:
            yield from self._intact(lambda sql: reading.verdicts(sql, wanted))

    def each_line(self, wanted: Wanted = ANY) -> Iterator[Line]:
        """`each_verdict`, as lines of the exchange format, which takes a third of the time."""
        if self.schema < 3:
            yield from map(Line.of, self._old_verdicts(wanted))
        else:
            yield from self._intact(lambda sql: reading.lines(sql, wanted))

    def each_trial(self, wanted: Wanted = ANY, *, origin: str | None = None) -> Iterator[Trial]:
        """The trials that are wanted, oldest first."""
        yield from self._intact(lambda sql: reading.trials(sql, wanted, origin))

    def each_text(self, selection: Selection) -> Generator[str, None, None]:
        """The lines of the verdicts that are selected, as `each_line` has them."""
        if self.schema < 3:
            wanted = Wanted(op=selection.op, gpu=selection.gpu)
            yield from (each.text for each in self.each_line(wanted) if selection.verdict(each))
        else:
            from tilebook.registry import outgoing

            yield from self._intact(lambda sql: outgoing.verdicts(sql, selection))

    def each_trial_line(self, selection: Selection) -> Generator[TrialLine, None, None]:
        """The lines of the trials that are selected, by op, problem and time."""
        from tilebook.registry import outgoing

        yield from self._intact(lambda sql: outgoing.trials(sql, selection))

    def empty(self) -> bool:
        """Has it neither verdicts nor trials nor revocations?"""
        with self.reading() as sql:
            tables = filter(sql.has, ("verdict", "trial", "revocation"))
            return not any(sql.rows(f"SELECT 1 FROM {table} LIMIT 1") for table in tables)

    def _intact(self, read: Callable[[Sql], Iterator[tuple[int, _T | None]]]) -> Iterator[_T]:
        lost = 0
        with self.reading() as sql:
            for _, record in read(sql):
                if record is None:
                    lost += 1
                else:
                    yield record
        self.count_lost(lost)

    def _old_verdicts(self, wanted: Wanted) -> Iterator[Written]:
        """Those of a registry that has the schema of before, which only a writer may upgrade."""
        with self.reading() as sql:
            found = self.intact(map(legacy.verdict_or_none, sql.rows(legacy.ROWS)))
        yield from map(Written, sorted(filter(wanted.has, found), key=lambda each: each.place))
