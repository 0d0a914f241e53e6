"""The layers as dispatch reads them: a SQLite file, a PostgreSQL database, the text of what ships.

Standard library only, unless a layer is on PostgreSQL.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tilebook.errors import RegistryError
from tilebook.registry import legacy, lookup, sqlitefile
from tilebook.registry.columns import all_revocations, lost_revocation, revocation_in
from tilebook.registry.layers import Text
from tilebook.registry.lookup import Answer, Execute, Question
from tilebook.registry.records import Device, Revocation
from tilebook.registry.served import Served, of
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Target, sniff

if TYPE_CHECKING:
    from tilebook.registry.store import Registry


CHECKED_BYTES = 1 << 20
"""More than this is not looked at as a whole before dispatch reads of it, which takes 1 ms a MB: a page that is damaged
costs the rows that are on it, and `tilebook check` and every writer look at all."""


class Reader(Protocol):
    """One registry; its answers raise RegistryError where there is none, and Locked where there may be one later."""

    name: str
    problems: list[str]
    wait_s: float  # for a lock

    def verdicts(self, op: str, device: Device, most: int | None = None) -> list[Served] | None:
        """All on the op for this device; None where there are more than `most`."""

    def answer(self, question: Question, device: Device) -> Answer:
        """See `lookup.answer`; asked only where `verdicts` gave None."""

    def some(self, op: str, kernel: str, device: Device, most: int) -> list[Served]:
        """See `lookup.some`; asked only where `verdicts` gave None."""

    def revocations(self) -> list[Revocation]: ...


class Database:
    """A layer on PostgreSQL, by way of SQLAlchemy."""

    def __init__(self, name: str, target: str, wait_s: float) -> None:
        self.name, self._target, self.wait_s = name, target, wait_s
        self.problems: list[str] = []

    def verdicts(self, op: str, device: Device, most: int | None = None) -> list[Served] | None:
        with self._open() as registry:
            if registry.schema < 4:
                return [of(verdict, self.name) for verdict in registry.verdicts(op=op, device=device)]
            with registry.asking() as execute:
                if most is not None and lookup.holds_more(execute, op, device, most):
                    return None
                found = [*lookup.verdicts(execute, self.name, op, device)]
        return self._intact(found)

    def answer(self, question: Question, device: Device) -> Answer:
        with self._open() as registry, registry.asking() as execute:
            found = lookup.answer(execute, self.name, device, question)
        self._lost(found.damaged)
        return found

    def some(self, op: str, kernel: str, device: Device, most: int) -> list[Served]:
        with self._open() as registry, registry.asking() as execute:
            return lookup.some(execute, self.name, device, op, kernel, most)

    def revocations(self) -> list[Revocation]:
        with self._open() as registry:
            return registry.revocations()

    @contextmanager
    def _open(self) -> Iterator[Registry]:
        from tilebook.registry.store import Registry

        with Registry.open(self._target, wait_s=self.wait_s) as registry:
            yield registry
            self.problems += registry.problems

    def _intact(self, found: Sequence[Served | None]) -> list[Served]:
        intact = [verdict for verdict in found if verdict is not None]
        self._lost(len(found) - len(intact))
        return intact

    def _lost(self, damaged: int) -> None:
        if damaged:
            self.problems.append(f"registry {Target.parse(self._target).label}: left out {damaged} damaged rows")


class ShippedText:
    """What ships, where no file can be built from its text."""

    name = "shipped"
    wait_s = 0.0

    def __init__(self, text: Text) -> None:
        self._text = text
        self.problems: list[str] = []

    def verdicts(self, op: str, device: Device, most: int | None = None) -> list[Served]:
        """All of them, whatever `most` is: a file must be read to its end to know how many there are."""
        found = self._text.verdicts(op=op, device=device)
        self.problems += self._text.problems
        return [of(verdict, self.name) for verdict in found]

    def answer(self, question: Question, device: Device) -> Answer:
        raise NotImplementedError

    def some(self, op: str, kernel: str, device: Device, most: int) -> list[Served]:
        raise NotImplementedError

    def revocations(self) -> list[Revocation]:
        found = self._text.revocations()
        self.problems += self._text.problems
        return found


State = tuple[int, int, int]
"""Of a file: another where it has been written to, or another file is in its place."""


class _Kept(NamedTuple):
    """A connection between two readings. It holds no lock, and is its own process's.

    versions: of the schema that it has read, see `_versions`.
    """

    connection: sqlite3.Connection
    state: State
    versions: tuple[int, int]
    process: int


_inherited: list[_Kept] = []
"""A forked process must neither use nor close what its parent has opened."""


class File:
    """A layer in a SQLite file.

    Its connection stays open for the next reading, since to open one takes as long as the whole of most answers, and
    while somebody tunes the file changes many times a second. What was made sure of is what the connection has read:
    the schema, which SQLite reads again only where its number is another. A new connection is made, with all the care
    that a stranger's file needs, where that is so, where another file is in its place, where its journal is nobody's,
    and of a changed file that is small enough to be looked at as a whole.
    """

    def __init__(self, name: str, path: Path, wait_s: float) -> None:
        self.name, self._path, self.wait_s = name, path, wait_s
        self.problems: list[str] = []
        self._examined: State | None = None
        self._schema = 0
        self._kept: list[_Kept] = []  # one, or none while it is used

    def verdicts(self, op: str, device: Device, most: int | None = None) -> list[Served] | None:
        with self._reading() as execute:
            # A file that has no positions yet is read as a whole, however much it holds: a writer has to upgrade it.
            if self._schema >= 4 and most is not None and lookup.holds_more(execute, op, device, most):
                return None
            read = lookup.verdicts if self._schema >= 3 else _old_verdicts
            found = [*read(execute, self.name, op, device)]
        intact = [verdict for verdict in found if verdict is not None]
        self._lost(len(found) - len(intact))
        return intact

    def answer(self, question: Question, device: Device) -> Answer:
        with self._reading() as execute:
            found = lookup.answer(execute, self.name, device, question)
        self._lost(found.damaged)
        return found

    def some(self, op: str, kernel: str, device: Device, most: int) -> list[Served]:
        with self._reading() as execute:
            return lookup.some(execute, self.name, device, op, kernel, most)

    def _lost(self, damaged: int) -> None:
        if damaged:
            self.problems.append(f"registry {self._path}: left out {damaged} damaged rows")

    def revocations(self) -> list[Revocation]:
        with self._reading() as execute:
            if not execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'revocation'", ()):
                return []
            rows = execute(all_revocations(self._schema), ())
        found = []
        for row in rows:
            revocation = revocation_in(row)
            if revocation is not None:
                found.append(revocation)
            else:
                self.problems.append(f"registry {self._path}: {lost_revocation(str(row[1]))}")
        return sorted(found, key=lambda each: (each.created_at, each.scope))

    @contextmanager
    def _reading(self) -> Iterator[Execute]:
        with sqlitefile.explained(self._path):
            if (kept := self._begun()) is not None:
                with self._keeping(kept):
                    yield _execute(kept.connection)
                return
            with sqlitefile.readable(self._path) as place:
                connection = sqlitefile.connect(place, "ro", 0.0)
                try:
                    sqlitefile.begin(connection, self.wait_s)
                    found = _Kept(connection, self._examine(connection, place), _versions(connection), os.getpid())
                except BaseException:
                    connection.close()
                    raise
                with self._keeping(found, place == self._path):
                    yield _execute(connection)

    def _begun(self) -> _Kept | None:
        """The connection of the last reading, with the next one begun, where what was made sure of still holds."""
        try:
            kept = self._kept.pop()
        except IndexError:
            return None
        if kept.process != os.getpid():
            _inherited.append(kept)
            return None
        again = None
        try:
            again = self._again(kept)
        except sqlite3.Error as error:
            if error.sqlite_errorname == "SQLITE_BUSY":
                raise
        except (OSError, RegistryError):
            pass  # whatever it is, the long way says it
        finally:
            if again is None:
                kept.connection.close()
        return again

    def _again(self, kept: _Kept) -> _Kept | None:
        state = _state(self._path)
        changed = state != kept.state
        if changed and (state[0] != kept.state[0] or state[2] <= CHECKED_BYTES):
            return None
        if changed or sqlitefile.in_mid_write(self._path):
            header = sniff(self._path)
            if header is None or header.wal:
                return None
        sqlitefile.begin(kept.connection, self.wait_s)
        return kept._replace(state=state) if _versions(kept.connection) == kept.versions else None

    @contextmanager
    def _keeping(self, kept: _Kept, keep: bool = True) -> Iterator[None]:
        """Ends a reading, and keeps its connection if nothing went wrong."""
        try:
            yield
            kept.connection.execute("ROLLBACK")
            keep = keep and not self._kept
        except BaseException:
            keep = False
            raise
        finally:
            if keep:
                self._kept.append(kept)
            else:
                kept.connection.close()

    def _examine(self, connection: sqlite3.Connection, place: Path) -> State:
        """Looks at the file as a whole before anything of it is read: once, and again where it has changed."""
        state = _state(place)
        if state == self._examined:
            return state
        sqlitefile.refuse_foreign_schema(connection, self._path)
        self._schema = sqlitefile.check_version(connection, self._path, OLDEST_READABLE, SCHEMA_VERSION)
        if damage := sqlitefile.damage(connection, place, CHECKED_BYTES):
            self.problems.append(f"registry {self._path}: the file is damaged ({damage}); rows may be missing")
        self._examined = state
        return state


def _state(path: Path) -> State:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _versions(connection: sqlite3.Connection) -> tuple[int, int]:
    """SQLite's number of the schema, which every change of it raises, and ours."""
    ((number,),) = connection.execute("PRAGMA schema_version")
    ((ours,),) = connection.execute("PRAGMA user_version")
    return number, ours


def _execute(connection: sqlite3.Connection) -> Execute:
    execute = connection.cursor().execute
    return lambda statement, values: execute(statement, values).fetchall()


def _old_verdicts(execute: Execute, layer: str, op: str, device: Device) -> Iterator[Served | None]:
    """As `lookup.verdicts`, of a file that no writer has brought to today's schema yet."""
    for row in execute(legacy.ROWS, ()):
        if tuple(row[2:5]) == (device.name, device.arch, device.sm_count) and op in (row[0], row[6]):
            verdict = legacy.verdict_or_none(row)
            yield None if verdict is None else of(verdict, layer)
