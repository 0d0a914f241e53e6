"""One registry: a database that keeps trials, verdicts, revocations and misses."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Engine, Select, select, text
from sqlalchemy.orm import Session, contains_eager, selectinload

from tilebook.errors import RegistryError
from tilebook.registry import backend, legacy, reading, schema, shipped
from tilebook.registry.backend import explained
from tilebook.registry.columns import all_revocations, revocation_in
from tilebook.registry.damage import Damage
from tilebook.registry.filereader import TRIALS, trial_in
from tilebook.registry.lookup import Execute
from tilebook.registry.merging import Choice, Merged, Rule, pour
from tilebook.registry.models import (
    Base,
    DeviceRow,
    KernelRow,
    MissRow,
    ProblemRow,
    RevocationRow,
    TrialRow,
    VerdictRow,
)
from tilebook.registry.quick import Line
from tilebook.registry.readers import lost_revocation
from tilebook.registry.records import Device, Miss, Revocation, Trial
from tilebook.registry.rows import Keys, miss_of, trial_of, verdict_of
from tilebook.registry.searched import observed
from tilebook.registry.sql import Sql
from tilebook.registry.target import SCHEMA_VERSION, Target, Unreachable, sniff
from tilebook.registry.texts import Record, Written
from tilebook.registry.verdict import Verdict
from tilebook.registry.wanted import Wanted

ANY = Wanted()
_RETRY_S = 0.5


_T = TypeVar("_T")
_Row = TypeVar("_Row", TrialRow, VerdictRow, MissRow)
_Record = TypeVar("_Record", Trial, Verdict, Miss)


def local_rule(existing: Verdict, new: Verdict) -> Choice:
    """The newest word counts, but a prediction never overwrites a measurement that may be served."""
    if new.trusted and not existing.trusted:
        return Choice(True, "a trusted verdict replaces one that is not")
    if existing.trusted and existing.measured and observed(new) and not observed(existing):
        return Choice(False, "what a program has observed does not replace a measurement")
    if existing.measured and not new.measured:
        return Choice(False, "a prediction does not replace a measurement")
    return Choice(True, "newer")


class Registry(Damage):
    """One layer of the registry: one SQLite file or PostgreSQL database.

    Guarantees, on both backends:

    - A write is one transaction: after `record`, `count_misses` or `merge` returns, all of it survives the death of the
      process (and of the machine, as far as its disk tells the truth); before, none of it is seen by anybody.
    - Writers wait for one another, up to 30 s, and for a server that is being restarted; any number of processes may
      create, open and write one registry at once.
    - Recording the same trial again changes nothing. There is at most one verdict for each (op, problem, device,
      kernel), and a prediction never replaces a measurement.
    - Revocations add up: of one scope the first stands, but a trusted one before one that is not. Only `unrevoke`
      removes any.
    - What is read equals what was recorded. A row whose SHA-256 does not match is left out, counted in `corrupt` and
      logged; `problems` has a line for all that was found damaged.
    - A SQLite file whose structure is damaged is read as far as it goes, with a line in `problems`, and never written.
    - A registry opened for reading is never changed: no file is created beside it, no schema is upgraded. A file that
      is not a tilebook registry is not modified in either mode.
    - Every failure of the store itself is a RegistryError with one line that names the registry.

    Connections are opened for each operation, so an instance may be used from several threads and after a fork.
    """

    def __init__(
        self,
        target: Target,
        engine: Engine,
        writable: bool,
        raw: str,
        found: schema.Found | None = None,
        cleanup: ExitStack | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(target.label)
        self._target = target
        self._engine: Engine | None = engine
        self.target = raw
        self.writable = writable
        self._patient = writable and wait_s is None and target.path is None
        self._cleanup = weakref.finalize(self, (cleanup or ExitStack()).close)
        self.schema = SCHEMA_VERSION if found is None else found.version
        if found is not None and found.damage:
            self.note(f"the file is damaged ({found.damage}); rows may be missing")

    @classmethod
    def open(
        cls, target: str | Path, *, write: bool = False, wait_s: float | None = None, upgrade: bool = True
    ) -> Self:
        """Opens a path or SQLAlchemy URL; `write` creates the parent directory, the file and the newest schema.

        wait_s: how long to wait for another process's lock, now and in each operation; None for what is usual.
        upgrade: whether a writer may create what is missing, and bring an older schema to the newest.
        Raises RegistryError: missing, unreadable, foreign, corrupt, of a newer schema, or (for reading) older;
        Locked, one of them, where the lock is still held.
        """
        parsed = Target.parse(target)
        with explained(parsed), ExitStack() as opening:
            if write:
                return cls(parsed, schema.open_writer(parsed, wait_s, upgrade), True, str(target), wait_s=wait_s)
            engine, found = schema.open_reader(parsed, opening, wait_s)
            return cls(parsed, engine, False, str(target), found, opening.pop_all())

    def record(self, trials: Iterable[Trial] = (), verdict: Verdict | None = None) -> None:
        """Stores trials and a verdict in one transaction; the verdict replaces one of the same key (see above)."""
        self.merge(trials, () if verdict is None else (verdict,))

    def merge(
        self,
        trials: Iterable[Trial] = (),
        verdicts: Iterable[Verdict] = (),
        revocations: Iterable[Revocation] = (),
        *,
        rule: Rule = local_rule,
        origin: str = "local",
    ) -> Merged:
        """`record` for many verdicts: `rule` decides each conflict, in the same transaction; `origin` marks trials."""
        records: list[Record] = [*trials, *map(Written, verdicts), *revocations]
        if not records:
            return Merged()
        try:
            return self.pour(records, rule=rule, origin=origin)
        except Unreachable:  # the server went away in mid-write; to merge a second time changes nothing
            return self.pour(records, rule=rule, origin=origin)

    def pour(self, records: Iterable[Record], *, rule: Rule = local_rule, origin: str = "local") -> Merged:
        """`merge` of more records than fit into memory, in one transaction still: what `records` raises undoes all."""
        with self._write() as session:
            return pour(Sql.of(session), records, rule, origin)

    def revoke(self, revocation: Revocation) -> bool:
        """Stores a revocation; False where one of the same scope stands already."""
        return bool(self.merge(revocations=[revocation]).revocations)

    def unrevoke(self, scope: str) -> bool:
        """Removes the revocation whose scope begins so, even a damaged one. Raises ValueError where several do."""
        with self._write() as session:
            rows = session.execute(select(RevocationRow)).scalars()
            found = [row for row in rows if str(row.scope).startswith(scope)]
            if len(found) > 1:
                raise ValueError(f"{len(found)} revocations begin with {scope}")
            for row in found:
                session.delete(row)
        return bool(found)

    def remove_damaged(self, aside: Callable[[Sequence[Base]], None] = lambda rows: None) -> int:
        """Removes the trials, verdicts and misses that readers leave out as damaged, and returns how many.

        `aside` is given their rows first, in the same transaction. Damaged revocations stay: what they revoked may run
        again, and whoever wrote them decides, see `unrevoke`.
        """
        with self._write() as session:
            read = ((row, decode) for query, decode in _DECODED for row in session.execute(query()).scalars())
            rows: list[Base] = [row for row, decode in read if decode(row) is None]
            aside(rows)
            for row in rows:
                session.delete(row)
        return len(rows)

    def count_misses(self, misses: Iterable[Miss]) -> None:
        """Adds calls to the ledger; the estimate of the time of a call and `last_seen` are the newest."""
        misses = list(misses)
        if not misses:
            return
        with self._write() as session:
            keys = Keys(session)
            for miss in misses:
                ids = {"problem_id": keys.problem(miss.op, miss.problem), "device_id": keys.device(miss.device)}
                row = session.execute(select(MissRow).filter_by(**ids)).scalar_one_or_none()
                known = None if row is None else miss_of(row)
                if known is not None:
                    miss = miss.plus(known)
                if row is None:
                    row = MissRow(**ids)
                    session.add(row)
                row.sha256, row.calls, row.time_ms, row.last_seen = (
                    miss.sha256,
                    miss.calls,
                    miss.time_ms,
                    miss.last_seen,
                )
                session.flush()

    def trials(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        kernel: str | None = None,
        origin: str | None = None,
    ) -> list[Trial]:
        """The trials that match, oldest first. `origin` "local" leaves out those that only an import vouches for."""
        query = _select(TrialRow, op, problem, device, kernel).order_by(TrialRow.id)
        if origin is not None:
            query = query.where(TrialRow.origin == origin)
        return self._read(query, trial_of)

    def verdicts(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        device: Device | None = None,
        kernel: str | None = None,
        gpu: str | None = None,
    ) -> list[Verdict]:
        """The verdicts that match, in the order of their keys. gpu: words of the GPU's name."""
        wanted = Wanted(op=op, problem=problem, device=device, kernel=kernel, gpu=gpu)
        return [each.verdict for each in self.each_verdict(wanted)]

    def each_verdict(self, wanted: Wanted = ANY) -> Iterator[Written]:
        """The verdicts that are wanted, in the order of their keys, and their texts; few are in memory at once.

        Until the last has been read, or the iterator is closed, nobody can write to a SQLite file.
        """
        return self._each(wanted, reading.verdicts, lambda written: written)

    def each_line(self, wanted: Wanted = ANY) -> Iterator[Line]:
        """`each_verdict`, as lines of the exchange format, which takes a third of the time."""
        return self._each(wanted, reading.lines, Line.of)

    def _each(
        self, wanted: Wanted, read: Callable[[Sql, Wanted], Iterator[_T | None]], of: Callable[[Written], _T]
    ) -> Iterator[_T]:
        if self.schema < 3:
            yield from (of(Written(each)) for each in self._old_verdicts(wanted))
            return
        lost = 0
        with self._session() as session:
            for each in read(Sql.of(session), wanted):
                if each is None:
                    lost += 1
                else:
                    yield each
        self.count_lost(lost)

    def each_trial(self, op: str | None = None) -> Iterator[Trial]:
        """All trials, or an op's, by op, problem and time; few are in memory at once. Else as `each_verdict`."""
        lost = 0
        with self._session() as session:
            sql = Sql.of(session)
            where, order = "" if op is None else "WHERE p.op = ?", f"p.op{sql.by_bytes}, p.key{sql.by_bytes}"
            statement = f"{TRIALS} {where} ORDER BY {order}, t.created_at"
            for _, *row in sql.each(statement, [] if op is None else [op]):
                if (trial := trial_in(row)) is None:
                    lost += 1
                else:
                    yield trial
        self.count_lost(lost)

    def revocations(self) -> list[Revocation]:
        """All of them, oldest first; the untrusted ones too."""
        with self._session() as session:
            rows = []
            if schema.has_revocations(session.connection()):
                rows = list(Sql.of(session).rows(all_revocations(self.schema)))
            found = [(str(row[1]), revocation_in(row)) for row in rows]
        lost = [scope for scope, revocation in found if revocation is None]
        self.corrupt = len(lost)
        for scope in lost:
            self.note(lost_revocation(scope))
        intact = [revocation for _, revocation in found if revocation is not None]
        return sorted(intact, key=lambda revocation: (revocation.created_at, revocation.scope))

    def misses(self, *, device: Device | None = None) -> list[Miss]:
        """The ledger, heaviest first: calls times the GPU time of a call."""
        found = self._read(_select(MissRow, None, None, device, None), miss_of)
        return sorted(found, key=lambda miss: (-miss.calls * miss.time_ms, miss.op, miss.problem, miss.device.name))

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
        self._engine = None
        self._cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Registry {self.label} ({'read and write' if self.writable else 'read only'})>"

    @contextmanager
    def asking(self) -> Iterator[Execute]:
        """What `lookup` asks by: statements with `?` for their parameters, of one state of the database."""
        with self._session() as session:
            yield Sql.of(session).rows

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction of today's schema, for `maintenance`; it may write where the registry is open for writing."""
        with self._session() as session:
            # A newer tilebook may have upgraded the schema since this one opened it.
            schema.check(schema.version(session.connection()), self._target)
            yield session

    @contextmanager
    def _session(self) -> Iterator[Session]:
        if self._engine is None:
            raise RegistryError(f"registry {self.label} is closed")
        with explained(self._target), Session(self._engine) as session, session.begin():
            self._connect(session)
            yield session

    def _connect(self, session: Session) -> None:
        """A writer waits for a server that is being restarted as long as it would for a lock."""
        deadline = time.monotonic() + (backend.WRITER_WAIT_S if self._patient else 0.0)
        while True:
            try:
                with explained(self._target):
                    session.connection()
                return
            except Unreachable:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY_S)

    @contextmanager
    def _write(self) -> Iterator[Session]:
        if not self.writable:
            raise RegistryError(f"registry {self.label} is open for reading only")
        with self.transaction() as session:
            yield session

    def _old_verdicts(self, wanted: Wanted) -> list[Verdict]:
        """Those of a registry that has the schema of before, which only a writer may upgrade."""
        with self._session() as session:
            rows = session.execute(text(legacy.ROWS)).all()
        found = self.intact(map(legacy.verdict_or_none, rows))
        return sorted(filter(wanted.has, found), key=lambda each: each.place)

    def _read(self, query: Select[_Row], decode: Callable[[_Row], _Record | None]) -> list[_Record]:
        with self._session() as session:
            found = [decode(row) for row in session.execute(query).scalars()]
        return self.intact(found)


def _select(
    model: type[_Row], op: str | None, problem: str | None, device: Device | None, kernel: str | None
) -> Select[_Row]:
    # Outer joins: a row whose partner cannot be found is damaged, and must be counted rather than vanish.
    query = select(model).outerjoin(model.problem).outerjoin(model.device)
    query = query.options(contains_eager(model.problem), contains_eager(model.device))
    if not issubclass(model, MissRow):
        query = query.outerjoin(model.environment).outerjoin(model.kernel)
        query = query.options(contains_eager(model.environment), contains_eager(model.kernel))
    wanted: dict[Any, Any] = {ProblemRow.op: op, ProblemRow.key: problem, KernelRow.digest: kernel}
    if device is not None:
        wanted |= {DeviceRow.name: device.name, DeviceRow.arch: device.arch, DeviceRow.sm_count: device.sm_count}
    return query.where(*(column == value for column, value in wanted.items() if value is not None))


# How the rows of each table are read as records; the decoders' arguments differ in type.
_DECODED: Sequence[tuple[Callable[[], Select[Any]], Callable[[Any], object]]] = (
    (lambda: _select(TrialRow, None, None, None, None), trial_of),
    (lambda: _select(VerdictRow, None, None, None, None).options(selectinload(VerdictRow.finalists)), verdict_of),
    (lambda: _select(MissRow, None, None, None, None), miss_of),
)


def ship(source: Registry, path: str | Path) -> int:
    """Writes what a package ships: the text beside `path` and, built from it, the registry at `path`; see `shipped`.

    What is trusted of verdicts and revocations goes in; trials stay behind. The file is in rollback-journal mode, so it
    opens from a read-only directory, and appears whole or not at all. Returns the number of verdicts. Raises
    RegistryError, also when `path` holds something else than a registry.
    """
    target = Target.parse(Path(path).absolute())
    assert target.path is not None
    sniff(target.path)
    with explained(target):
        return shipped.write(target.path, source.verdicts(), source.revocations())
