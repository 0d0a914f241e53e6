"""A SQLite registry opened for reading with the standard library alone: for commands that only read.

`Registry` reads the same, and PostgreSQL too; to import SQLAlchemy takes longer than to read all that ships.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tilebook.errors import RegistryError
from tilebook.registry import sqlitefile
from tilebook.registry.checks import quoted
from tilebook.registry.contents import Contents
from tilebook.registry.sql import Sql
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Target

if TYPE_CHECKING:
    from tilebook.registry.store import Registry

WAIT_S = 1.0
"""How long a reader waits for a writer's lock."""


class FileReader(Contents):
    """A SQLite registry, opened for reading: what `Registry` promises of its readers holds.

    It is one reading: all that is asked for until it is closed is of one state of the file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, schema: int, cleanup: ExitStack) -> None:
        super().__init__(str(path))
        self.schema = schema
        self._path, self._sql, self._cleanup = path, Sql(connection), cleanup

    @classmethod
    def open(cls, path: Path, wait_s: float = WAIT_S) -> Self:
        """Raises RegistryError as `Registry.open` does."""
        with sqlitefile.explained(path), ExitStack() as opening:
            place = opening.enter_context(sqlitefile.readable(path))
            before = sqlitefile.identity(place)
            connection, schema = connected(place, path, wait_s)
            opening.callback(connection.close)
            damage = sqlitefile.damage(connection, place)
            reading = cls(path, connection, schema, opening.pop_all())
            reading._sql.file = sqlitefile.same(place, before)
        if damage:
            reading.note(f"the file is damaged ({damage}); rows may be missing")
        return reading

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @contextmanager
    def reading(self) -> Iterator[Sql]:
        with sqlitefile.explained(self._path):
            yield self._sql

    @contextmanager
    def transaction(self) -> Iterator[Sql]:
        """As `Registry.transaction`, of which nothing may be written."""
        sqlitefile.refuse_version(self.schema, self.label, SCHEMA_VERSION, SCHEMA_VERSION)
        with self.reading() as sql:
            yield sql

    def structure(self, most: int = 10) -> list[str]:
        """What SQLite finds wrong with the file's pages and indexes, and with what rows refer to: the first of it."""
        with self.reading() as sql:
            found = [quoted(line).strip("'\"") for (line,) in sql.rows(f"PRAGMA integrity_check({most})")]
            lost = list(itertools.islice(sql.each("PRAGMA foreign_key_check"), most))
        return [line for line in found if line != "ok"] + [
            f"row {number} of {quoted(table)} refers to one of {quoted(other)} that is not there"
            for table, number, other, _ in lost
        ]


def connected(place: Path, path: Path, wait_s: float) -> tuple[sqlite3.Connection, int]:
    """A connection that reads one state of the file at a place, and the file's schema. path: the registry's, for
    people. What SQLite raises comes as it is."""
    with ExitStack() as opening:
        connection = sqlitefile.connect(place, "ro", wait_s)
        opening.callback(connection.close)
        sqlitefile.begin(connection)
        sqlitefile.refuse_foreign_schema(connection, path)
        schema = sqlitefile.check_version(connection, path, OLDEST_READABLE, SCHEMA_VERSION)
        if not sqlitefile.tables_of(schema) <= sqlitefile.tables(connection):
            raise RegistryError(f"registry {path} is corrupt: its tables are not those of a tilebook registry")
        opening.pop_all()
    return connection, schema


def reader(target: str) -> FileReader | Registry:
    """A registry opened for reading, a file the quicker way. Raises RegistryError."""
    path = Target.parse(target).path
    if path is not None:
        return FileReader.open(path)
    from tilebook.registry.store import Registry

    return Registry.open(target)
