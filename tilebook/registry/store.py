"""One registry: a database that keeps trials, verdicts, revocations and misses."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Connection, Engine

from tilebook.errors import RegistryError
from tilebook.registry import backend, schema, shipped, sqlitefile
from tilebook.registry.backend import explained
from tilebook.registry.contents import Contents
from tilebook.registry.lookup import Execute
from tilebook.registry.merging import Choice, Merged, Rule, pour
from tilebook.registry.records import Miss, Revocation, Trial
from tilebook.registry.searched import observed
from tilebook.registry.sql import Sql
from tilebook.registry.tally import tally
from tilebook.registry.target import SCHEMA_VERSION, Target, Unreachable, sniff
from tilebook.registry.texts import Record, Written
from tilebook.registry.verdict import Verdict

_RETRY_S = 0.5


def local_rule(existing: Verdict, new: Verdict) -> Choice:
    """The newest word counts, but a prediction never overwrites a measurement that may be served."""
    if new.trusted and not existing.trusted:
        return Choice(True, "a trusted verdict replaces one that is not")
    if existing.trusted and existing.measured and observed(new) and not observed(existing):
        return Choice(False, "what a program has observed does not replace a measurement")
    if existing.measured and not new.measured:
        return Choice(False, "a prediction does not replace a measurement")
    return Choice(True, "newer")


class Registry(Contents):
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
        self._place = target.path if found is None else found.place
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
        with self._write() as sql:
            return pour(sql, records, rule, origin)

    def revoke(self, revocation: Revocation) -> bool:
        """Stores a revocation; False where one of the same scope stands already."""
        return bool(self.merge(revocations=[revocation]).revocations)

    def unrevoke(self, scope: str) -> bool:
        """Removes the revocation whose scope begins so, even a damaged one. Raises ValueError where several do."""
        with self._write() as sql:
            rows = sql.rows("SELECT id, scope FROM revocation")
            found = [number for number, its in rows if str(its).startswith(scope)]
            if len(found) > 1:
                raise ValueError(f"{len(found)} revocations begin with {scope}")
            sql.delete("revocation", "id", found)
        return bool(found)

    def count_misses(self, misses: Iterable[Miss]) -> None:
        """Adds calls to the ledger; the estimate of the time of a call and `last_seen` are the newest."""
        misses = list(misses)
        if not misses:
            return
        with self._write() as sql:
            tally(sql, misses)

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
        with self.reading() as sql:
            yield sql.rows

    @contextmanager
    def reading(self) -> Iterator[Sql]:
        before = None if self._place is None else sqlitefile.identity(self._place)
        with self._connected() as connection:
            sql = Sql.of(connection)
            sql.file = None if self._place is None else sqlitefile.same(self._place, before)
            yield sql

    @contextmanager
    def transaction(self) -> Iterator[Sql]:
        """One transaction of today's schema, for `maintenance`; it may write where the registry is open for writing."""
        with self._connected() as connection:
            # A newer tilebook may have upgraded the schema since this one opened it.
            schema.check(schema.version(connection), self._target)
            yield Sql.of(connection)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        if self._engine is None:
            raise RegistryError(f"registry {self.label} is closed")
        with explained(self._target), ExitStack() as ending:
            yield self._begun(self._engine, ending)

    def _begun(self, engine: Engine, ending: ExitStack) -> Connection:
        """A writer waits for a server that is being restarted as long as it would for a lock."""
        deadline = time.monotonic() + (backend.WRITER_WAIT_S if self._patient else 0.0)
        while True:
            try:
                with explained(self._target):
                    return ending.enter_context(engine.begin())
            except Unreachable:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_RETRY_S)

    @contextmanager
    def _write(self) -> Iterator[Sql]:
        if not self.writable:
            raise RegistryError(f"registry {self.label} is open for reading only")
        with self.transaction() as sql:
            yield sql


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
