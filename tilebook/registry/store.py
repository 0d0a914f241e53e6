"""One registry: a database that keeps trials, verdicts, revocations and misses."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from sqlalchemy import Engine, Select, insert, select, text, update
from sqlalchemy.orm import Session, contains_eager, selectinload

from tilebook.errors import RegistryError
from tilebook.registry import legacy, schema, shipped
from tilebook.registry.backend import explained
from tilebook.registry.columns import finalist_columns, revocation_columns, trial_columns, verdict_columns
from tilebook.registry.models import (
    Base,
    DeviceRow,
    FinalistRow,
    KernelRow,
    MissRow,
    ProblemRow,
    RevocationRow,
    TrialRow,
    VerdictRow,
)
from tilebook.registry.records import Device, Miss, Revocation, Trial
from tilebook.registry.rows import Keys, miss_of, revocation_of, trial_of, verdict_of
from tilebook.registry.serving import lost_revocation
from tilebook.registry.target import SCHEMA_VERSION, Target, sniff
from tilebook.registry.verdict import Verdict

log = logging.getLogger("tilebook.registry")

_Row = TypeVar("_Row", TrialRow, VerdictRow, MissRow)
_Record = TypeVar("_Record", Trial, Verdict, Miss)


class Choice(NamedTuple):
    """Whether a new verdict takes an existing one's place, and why."""

    replace: bool
    why: str


Rule = Callable[[Verdict, Verdict], Choice]  # (existing, new)


@dataclass
class Merged:
    """What one `merge` did; `replaced` and `kept` hold one line per verdict that met another."""

    trials: int = 0
    verdicts: int = 0
    revocations: int = 0
    unchanged: int = 0
    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def local_rule(existing: Verdict, new: Verdict) -> Choice:
    """The newest word counts, but a prediction never overwrites a measurement that may be served."""
    if new.trusted and not existing.trusted:
        return Choice(True, "a trusted verdict replaces one that is not")
    if existing.measured and not new.measured:
        return Choice(False, "a prediction does not replace a measurement")
    return Choice(True, "newer")


class Registry:
    """One layer of the registry: one SQLite file or PostgreSQL database.

    Guarantees, on both backends:

    - A write is one transaction: after `record`, `count_misses` or `merge` returns, all of it survives the death of the
      process (and of the machine, as far as its disk tells the truth); before, none of it is seen by anybody.
    - Writers wait for one another, up to 30 s; any number of processes may create, open and write one registry at once.
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
    ) -> None:
        self._target = target
        self._engine: Engine | None = engine
        self.target = raw
        self.label = target.label
        self.writable = writable
        self.corrupt = 0
        self.problems: list[str] = []
        self._cleanup = weakref.finalize(self, (cleanup or ExitStack()).close)
        self._schema = SCHEMA_VERSION if found is None else found.version
        if found is not None and found.damage:
            self._problem(f"the file is damaged ({found.damage}); rows may be missing")

    @classmethod
    def open(cls, target: str | Path, *, write: bool = False, wait_s: float | None = None) -> Self:
        """Opens a path or SQLAlchemy URL; `write` creates the parent directory, the file and the newest schema.

        wait_s: how long to wait for another process's lock, now and in each operation; None for what is usual.
        Raises RegistryError: missing, unreadable, foreign, corrupt, of a newer schema, or (for reading) older;
        Locked, one of them, where the lock is still held.
        """
        parsed = Target.parse(target)
        with explained(parsed), ExitStack() as opening:
            if write:
                return cls(parsed, schema.open_writer(parsed, wait_s), True, str(target))
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
        trials, verdicts, revocations = list(trials), list(verdicts), list(revocations)
        merged = Merged()
        if trials or verdicts or revocations:
            with self._write() as session:
                keys = Keys(session)
                merged.trials = _add_trials(session, keys, trials, origin)
                for verdict in verdicts:
                    _add_verdict(session, keys, verdict, rule, merged)
                for revocation in revocations:
                    _add_revocation(session, revocation, merged)
        return merged

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
        """The verdicts that match, in the order of their keys. gpu: part of the device's name, in whatever case."""
        if self._schema < 3:
            found = self._old_verdicts(op, problem, device, kernel)
        else:
            query = _select(VerdictRow, op, problem, device, kernel).options(selectinload(VerdictRow.finalists))
            found = self._read(query, verdict_of)
        found = [each for each in found if not gpu or gpu.lower() in each.device.name.lower()]
        return sorted(found, key=lambda v: (v.op, v.problem, v.device.name, v.device.arch, v.device.sm_count, v.kernel))

    def revocations(self) -> list[Revocation]:
        """All of them, oldest first; the untrusted ones too."""
        with self._session() as session:
            rows = []
            if schema.has_revocations(session.connection()):
                # All rows: a damaged one must not hide behind a condition that it would have met.
                rows = list(session.execute(select(RevocationRow)).scalars())
            found = [(str(row.scope), revocation_of(row)) for row in rows]
        lost = [scope for scope, revocation in found if revocation is None]
        self.corrupt = len(lost)
        for scope in lost:
            self._problem(lost_revocation(scope))
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
    def transaction(self) -> Iterator[Session]:
        """One transaction of today's schema, for `maintenance`; it may write where the registry is open for writing."""
        with self._write() if self.writable else self._session() as session:
            schema.check(schema.version(session.connection()), self._target)
            yield session

    @contextmanager
    def _session(self) -> Iterator[Session]:
        if self._engine is None:
            raise RegistryError(f"registry {self.label} is closed")
        with explained(self._target), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def _write(self) -> Iterator[Session]:
        if not self.writable:
            raise RegistryError(f"registry {self.label} is open for reading only")
        with self._session() as session:
            # A newer tilebook may have upgraded the schema since this one opened it.
            schema.check(schema.version(session.connection()), self._target)
            yield session

    def _old_verdicts(
        self, op: str | None, problem: str | None, device: Device | None, kernel: str | None
    ) -> list[Verdict]:
        """Those of a registry that has the schema of before, which only a writer may upgrade."""
        with self._session() as session:
            rows = session.execute(text(legacy.ROWS)).all()
        found = [legacy.verdict_or_none(row) for row in rows]
        intact = [verdict for verdict in found if verdict is not None]
        self._count_lost(len(found) - len(intact))
        return [
            each
            for each in intact
            if op in (None, each.op)
            and problem in (None, each.problem)
            and device in (None, each.device)
            and kernel in (None, each.kernel)
        ]

    def _read(self, query: Select[_Row], decode: Callable[[_Row], _Record | None]) -> list[_Record]:
        with self._session() as session:
            found = [decode(row) for row in session.execute(query).scalars()]
        intact = [record for record in found if record is not None]
        self._count_lost(len(found) - len(intact))
        return intact

    def _count_lost(self, lost: int) -> None:
        self.corrupt = lost
        if lost:
            self._problem(f"left out {lost} damaged rows")

    def _problem(self, text: str) -> None:
        self.problems.append(f"registry {self.label}: {text}")
        log.warning("%s", self.problems[-1])


def _select(
    model: type[_Row], op: str | None, problem: str | None, device: Device | None, kernel: str | None
) -> Select[_Row]:
    # Outer joins: a row whose partner cannot be found is damaged, and must be counted rather than vanish.
    query = select(model).outerjoin(model.problem).outerjoin(model.device)
    query = query.options(contains_eager(model.problem), contains_eager(model.device))
    if not issubclass(model, MissRow):
        query = query.outerjoin(model.environment).outerjoin(model.kernel)
        query = query.options(contains_eager(model.environment), contains_eager(model.kernel))
    if op is not None:
        query = query.where(ProblemRow.op == op)
    if problem is not None:
        query = query.where(ProblemRow.key == problem)
    if device is not None:
        query = query.where(
            DeviceRow.name == device.name, DeviceRow.arch == device.arch, DeviceRow.sm_count == device.sm_count
        )
    if kernel is not None:
        query = query.where(KernelRow.digest == kernel)
    return query


# How the rows of each table are read as records; the decoders' arguments differ in type.
_DECODED: Sequence[tuple[Callable[[], Select[Any]], Callable[[Any], object]]] = (
    (lambda: _select(TrialRow, None, None, None, None), trial_of),
    (lambda: _select(VerdictRow, None, None, None, None).options(selectinload(VerdictRow.finalists)), verdict_of),
    (lambda: _select(MissRow, None, None, None, None), miss_of),
)


def _add_trials(session: Session, keys: Keys, trials: Sequence[Trial], origin: str) -> int:
    new: dict[str, dict[str, Any]] = {}
    for trial in trials:
        columns = {**keys.of(trial), **trial_columns(trial, origin)}
        new[columns["sha256"]] = columns
    known: set[str] = set()
    hashes = list(new)
    for start in range(0, len(hashes), 500):  # databases limit the parameters of a statement
        part = hashes[start : start + 500]
        known.update(session.execute(select(TrialRow.sha256).where(TrialRow.sha256.in_(part))).scalars())
        if origin == "local":
            imported = TrialRow.sha256.in_(part), TrialRow.origin != origin
            session.execute(update(TrialRow).where(*imported).values(origin=origin))
    rows = [columns for sha256, columns in new.items() if sha256 not in known]
    if rows:
        session.execute(insert(TrialRow), rows)
    return len(rows)


def _add_verdict(session: Session, keys: Keys, verdict: Verdict, rule: Rule, merged: Merged) -> None:
    ids = keys.of(verdict)
    place = {name: ids[name] for name in ("problem_id", "device_id", "kernel_id")}
    row = session.execute(select(VerdictRow).filter_by(**place)).scalar_one_or_none()
    existing = None if row is None else verdict_of(row)
    if existing is not None:
        choice = rule(existing, verdict)
        same = existing.portable() == verdict.portable()
        if existing.sha256 == verdict.sha256 or (same and not choice.replace):
            merged.unchanged += 1
            return
        line = f"{verdict.op} {verdict.problem} on {verdict.device.name}: {choice.why}"
        (merged.replaced if choice.replace else merged.kept).append(line)
        if not choice.replace:
            return
    if row is not None:
        session.delete(row)
        session.flush()
    finalists = [FinalistRow(**finalist_columns(each, place)) for place, each in enumerate(verdict.finalists)]
    session.add(VerdictRow(**ids, **verdict_columns(verdict), finalists=finalists))
    session.flush()
    merged.verdicts += 1


def _add_revocation(session: Session, revocation: Revocation, merged: Merged) -> None:
    row = session.execute(select(RevocationRow).filter_by(scope=revocation.scope)).scalar_one_or_none()
    existing = None if row is None else revocation_of(row)
    if existing is not None and not _goes_before(revocation, existing):
        merged.unchanged += 1
        return
    if row is None:
        row = RevocationRow()
        session.add(row)
    for name, value in revocation_columns(revocation).items():
        setattr(row, name, value)
    session.flush()
    merged.revocations += 1


def _goes_before(new: Revocation, existing: Revocation) -> bool:
    """The trusted one of two stands, then one's own, then the first; whichever was merged first."""

    def rank(each: Revocation) -> tuple[object, ...]:
        return not each.trusted, each.origin == "imported", each.created_at, each.sha256

    return rank(new) < rank(existing)


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
