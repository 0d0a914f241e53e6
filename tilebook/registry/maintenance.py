"""Keeping a registry in order: what is damaged is found and set aside, what nobody needs any more is removed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, exists, func, select, text
from sqlalchemy.orm import Session

from tilebook.errors import RegistryError
from tilebook.registry import sqlitefile
from tilebook.registry.backend import WRITER_WAIT_S
from tilebook.registry.checks import DAMAGE, called, sources, time_text
from tilebook.registry.models import (
    Base,
    DeviceRow,
    EnvironmentRow,
    FinalistRow,
    KernelRow,
    ProblemRow,
    TrialRow,
    VerdictRow,
)
from tilebook.registry.selection import Selection
from tilebook.registry.store import Registry
from tilebook.registry.target import Target

_SHARED: Sequence[type[Base]] = (ProblemRow, DeviceRow, EnvironmentRow, KernelRow)
_PART = 500  # databases limit the parameters of a statement


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


def choose(registry: Registry, wanted: Sequence[Wanted]) -> Chosen:
    """What `remove` would remove."""
    with registry.transaction() as session:
        return _choose(session, wanted)


def remove(registry: Registry, wanted: Sequence[Wanted]) -> Chosen:
    """Removes what fits any of these, in one transaction; returns what it was. Revocations and the ledger stay."""
    with registry.transaction() as session:
        chosen = _choose(session, wanted)
        for part in _parts([each.id for each in chosen.verdicts]):
            for row in session.execute(select(VerdictRow).where(VerdictRow.id.in_(part))).scalars():
                session.delete(row)  # with what is part of it
            session.flush()
        for part in _parts([each.id for each in chosen.trials]):
            session.execute(delete(TrialRow).where(TrialRow.id.in_(part)))
    return chosen


def tidy(registry: Registry) -> int:
    """Removes the problems, devices, kernels and environments that no record names any more; returns how many."""
    removed = 0
    with registry.transaction() as session:
        for model in _SHARED:
            table = model.metadata.tables[model.__tablename__]
            named = [exists().where(column == table.c.id) for column in _references(model)]
            rows = session.execute(select(table.c.id).where(and_(*(~each for each in named)))).scalars().all()
            for part in _parts(rows):
                session.execute(delete(model).where(table.c.id.in_(part)))
            removed += len(rows)
    return removed


def shrink(target: str) -> int:
    """Gives a SQLite file's unused pages back to the file system; returns the bytes. Raises RegistryError."""
    path = Target.parse(target).path
    if path is None:
        return 0
    before = path.stat().st_size
    with (
        sqlitefile.explained(path),
        contextlib.closing(sqlitefile.connect(path, "rw", WRITER_WAIT_S)) as connection,
    ):
        sqlitefile.refuse_foreign_schema(connection, path)
        connection.execute("VACUUM")
    return before - path.stat().st_size


def repair(registry: Registry, aside: Path) -> int:
    """Moves the damaged rows of a registry to the file `aside`, which must not exist; returns how many.

    It has a line of JSON for each, to be looked at; nothing reads it back. Where nothing is damaged, it is not made.
    Damaged revocations stay, see `Registry.remove_damaged`. Raises RegistryError.
    """

    def write(rows: Sequence[Base]) -> None:
        if rows:
            try:
                with aside.open("x", encoding="utf-8") as file:
                    file.writelines(json.dumps(_spelled(row)) + "\n" for row in rows)
            except OSError as error:
                raise RegistryError(f"damaged rows cannot be set aside in {aside}: {error.strerror}") from error

    removed = registry.remove_damaged(write)
    with registry.transaction() as session:
        verdicts = select(VerdictRow.id)
        for column in _references(VerdictRow):  # parts of verdicts that are not there
            session.execute(delete(column.table).where(column.not_in(verdicts)))
        if session.connection().dialect.name == "sqlite":
            session.execute(text("REINDEX"))
    return removed


def _choose(session: Session, wanted: Sequence[Wanted]) -> Chosen:
    verdicts: dict[int, Found] = {}
    trials: dict[int, Found] = {}
    for each in wanted:
        for kind, found, query, place in (
            (each.verdicts, verdicts, _verdicts, 0),
            (each.trials, trials, _trials, 1),
        ):
            rows = query(session, each.selection) if kind else ()
            found.update((row.id, row) for row in rows if each.retired is None or each.retired[place](row))
    return Chosen(list(verdicts.values()), list(trials.values()))


def _verdicts(session: Session, selection: Selection) -> Iterator[Found]:
    conditions = _conditions(session, VerdictRow, selection)
    if selection.measured:
        conditions.append(VerdictRow.status != "predicted")
    winner = and_(FinalistRow.verdict_id == VerdictRow.id, FinalistRow.place == 0)
    query = (
        select(*_named(VerdictRow), FinalistRow.implementation, VerdictRow.sources)
        .outerjoin(VerdictRow.problem)
        .outerjoin(VerdictRow.device)
        .outerjoin(VerdictRow.kernel)
        .outerjoin(FinalistRow, winner)
        .where(*conditions)
    )
    for number, op, device, kernel, implementation, its in session.execute(query):
        yield Found(number, op, device, kernel, implementation or "", _sources(its))


def _trials(session: Session, selection: Selection) -> Iterator[Found]:
    conditions = _conditions(session, TrialRow, selection)
    if selection.measured:
        conditions.append(TrialRow.time_ms.is_not(None))
    query = (
        select(*_named(TrialRow), TrialRow.implementation)
        .outerjoin(TrialRow.problem)
        .outerjoin(TrialRow.device)
        .outerjoin(TrialRow.kernel)
        .where(*conditions)
    )
    for number, op, device, kernel, implementation in session.execute(query):
        yield Found(number, op, device, kernel, implementation)


def _named(model: type[VerdictRow] | type[TrialRow]) -> tuple[Any, Any, Any, Any]:
    """The columns of `Found` that both have; a damaged row may lack its partners."""
    return (
        model.id,
        func.coalesce(ProblemRow.op, ""),
        func.coalesce(DeviceRow.name, ""),
        func.coalesce(KernelRow.digest, ""),
    )


def _conditions(
    session: Session, model: type[VerdictRow] | type[TrialRow], selection: Selection
) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if selection.op is not None:
        found.append(ProblemRow.op == selection.op)
    if selection.gpu:
        devices = session.execute(select(DeviceRow.id, DeviceRow.name))
        found.append(model.device_id.in_([number for number, name in devices if called(selection.gpu, str(name))]))
    if selection.dtype is not None:  # keys are canonical JSON
        found.append(ProblemRow.key.contains(f'"dtype":"{selection.dtype}"', autoescape=True))
    if selection.since is not None:
        found.append(model.created_at >= selection.since)
    if selection.before is not None:
        found.append(model.created_at < selection.before)
    if selection.origin is not None:
        found.append(model.origin == selection.origin)
    return found


def _sources(value: str) -> Mapping[str, str]:
    try:
        return sources(json.loads(value))
    except DAMAGE:
        return {}


def _references(model: type[Base]) -> Iterator[Any]:
    """The columns of all tables that name a row of this one."""
    for table in Base.metadata.tables.values():
        for key in table.foreign_keys:
            if key.column.table.name == model.__tablename__:
                yield key.parent


def _parts(ids: Sequence[int]) -> Iterable[Sequence[int]]:
    return (ids[start : start + _PART] for start in range(0, len(ids), _PART))


def _spelled(row: Base) -> dict[str, Any]:
    """A row as it stands, with the rows that are part of it or that it shares."""
    columns = {column.name: _plain(getattr(row, column.name)) for column in row.__table__.columns}
    found: dict[str, Any] = {"table": row.__tablename__, **columns}
    for model in _SHARED:
        partner = getattr(row, model.__tablename__, None)
        if isinstance(partner, model):
            found[model.__tablename__] = {
                column.name: _plain(getattr(partner, column.name)) for column in partner.__table__.columns
            }
    if isinstance(row, VerdictRow):
        found["finalists"] = [_spelled(each) for each in row.finalists]
    return found


def _plain(value: object) -> object:
    return time_text(value) if isinstance(value, datetime) else value if isinstance(value, int | float | str) else None
