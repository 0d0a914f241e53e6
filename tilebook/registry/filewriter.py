"""A SQLite registry opened for writing with the standard library alone: for commands that move records.

`Registry` writes the same, and to PostgreSQL too; to import SQLAlchemy takes longer than to write all that ships.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tilebook.errors import RegistryError
from tilebook.registry import shipped, sqlitefile
from tilebook.registry.merging import Merged, Rule, pour
from tilebook.registry.sql import Sql
from tilebook.registry.target import APPLICATION_ID, OLDEST_READABLE, SCHEMA_VERSION, Target, sniff
from tilebook.registry.texts import Record

if TYPE_CHECKING:
    from tilebook.registry.store import Registry

WAIT_S = 30.0
"""How long a writer waits for another's lock."""


class FileWriter:
    """A SQLite registry of today's schema, opened to have records poured in: what `Registry` promises of that holds.

    A connection lives for one operation.
    """

    def __init__(self, path: Path, wait_s: float) -> None:
        self.label = self.target = str(path)
        self._path, self._wait_s = path, wait_s

    @classmethod
    def open(cls, path: Path, wait_s: float = WAIT_S) -> Self | None:
        """Makes the folder, the file and the schema that are missing; None where the schema is an older one.

        Raises RegistryError as `Registry.open` does.
        """
        with sqlitefile.explained(path):
            unlock(path, wait_s)
            with closing(sqlitefile.connect(path, "rwc", wait_s)) as connection:
                sqlitefile.begin_writing(connection, wait_s)
                ready = prepared(connection, path)
                connection.execute("COMMIT" if ready else "ROLLBACK")
        return cls(path, wait_s) if ready else None

    def pour(self, records: Iterable[Record], *, rule: Rule, origin: str) -> Merged:
        """See `Registry.pour`."""
        with self.transaction() as sql:
            return pour(sql, records, rule, origin)

    @contextmanager
    def transaction(self) -> Iterator[Sql]:
        """One transaction, which what is raised in it undoes."""
        with sqlitefile.explained(self._path), closing(sqlitefile.connect(self._path, "rw", self._wait_s)) as found:
            sqlitefile.begin_writing(found, self._wait_s)
            # A newer tilebook may have upgraded the schema since this one opened it.
            sqlitefile.check_version(found, self._path, SCHEMA_VERSION, SCHEMA_VERSION)
            yield Sql(found)
            found.execute("COMMIT")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __repr__(self) -> str:
        return f"<FileWriter {self.label}>"


def writer(target: str) -> FileWriter | Registry:
    """A registry opened to have records poured in, a file of today's schema the quicker way. Raises RegistryError."""
    path = Target.parse(target).path
    if path is not None and (found := FileWriter.open(path)) is not None:
        return found
    from tilebook.registry.store import Registry

    return Registry.open(target, write=True)


def unlock(path: Path, wait_s: float) -> None:
    """Makes the folder of a file that is missing, and takes one that is there out of WAL mode."""
    header = sniff(path)
    if header is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif header.wal:
        with closing(sqlitefile.connect(path, "rw", wait_s)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")


def prepared(connection: sqlite3.Connection, path: Path, make: bool = True) -> bool:
    """Has the file today's schema now? Asked in a transaction that may write; an empty file gets it, if it may be made.

    Raises RegistryError for what is not to be written: what is no registry, of a newer schema, or damaged.
    """
    sqlitefile.refuse_foreign_schema(connection, path)
    if found := sqlitefile.damage(connection, path, math.inf):
        raise RegistryError(
            f"registry {path} is corrupt: {found}; export what is left of it and import that into a new one"
        )
    empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    identity = connection.execute("PRAGMA application_id").fetchone()[0]
    if identity != APPLICATION_ID and not (identity == 0 and empty):
        raise RegistryError(f"{path} is a SQLite database, but not a tilebook registry")
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version:
        sqlitefile.refuse_version(version, str(path), OLDEST_READABLE, SCHEMA_VERSION)
    if version != SCHEMA_VERSION and empty and make:
        for statement in shipped.schema():
            connection.execute(statement)
        stamp(connection)
        version = SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        return False
    if not sqlitefile.tables_of(version) <= sqlitefile.tables(connection):
        raise RegistryError(f"registry {path} is corrupt: its tables are not those of a tilebook registry")
    return True


def stamp(connection: sqlite3.Connection) -> None:
    """Says in the file's header that it is a registry of today's schema."""
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
