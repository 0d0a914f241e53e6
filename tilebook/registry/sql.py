"""Statements of plain text on SQLite and PostgreSQL, for what goes through too many rows for objects of each."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tilebook.registry.checks import parse_time, time_text

if TYPE_CHECKING:
    from sqlalchemy import Connection

Row = Sequence[Any]
File = tuple[Path, int, int]
"""A place, and the device and the number of the file that is there."""

_PART = 500  # databases limit the parameters of a statement


class Sql:
    """A driver's connection; a statement's parameters are written `?`. The driver's errors come as they are.

    file: what is read, where that is a file whose place others may read too.
    """

    def __init__(self, connection: Any) -> None:
        self._sqlite = isinstance(connection, sqlite3.Connection)
        self._raw = connection
        self._cursor = connection.cursor()
        self._last: dict[str, int] = {}
        self.file: File | None = None

    @classmethod
    def of(cls, connection: Connection) -> Self:
        """In the connection's transaction."""
        return cls(connection.connection.dbapi_connection)

    def rows(self, statement: str, values: Sequence[Any] = ()) -> Sequence[Row]:
        self._cursor.execute(self._text(statement), tuple(values))
        return self._cursor.fetchall()  # type: ignore[no-any-return]

    def named(self, statement: str, values: Sequence[Any] = ()) -> Sequence[dict[str, Any]]:
        """The rows by the names of their columns."""
        self._cursor.execute(self._text(statement), tuple(values))
        names = [column[0] for column in self._cursor.description]
        return [dict(zip(names, row, strict=True)) for row in self._cursor.fetchall()]

    def each(self, statement: str, values: Sequence[Any] = ()) -> Iterator[Row]:
        """The rows one after another, more than memory may hold; other statements may run meanwhile."""
        cursor = self._raw.cursor() if self._sqlite else self._raw.cursor(name="each_row")
        try:
            cursor.execute(self._text(statement), tuple(values))
            while found := cursor.fetchmany(1_000):
                yield from found
        finally:
            with contextlib.suppress(sqlite3.ProgrammingError):  # whoever was interrupted has closed the database
                cursor.close()

    def run(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Returns how many rows it has changed."""
        self._cursor.execute(self._text(statement), tuple(values))
        return int(self._cursor.rowcount)

    def insert(
        self, table: str, columns: Iterable[str], rows: Sequence[Sequence[Any]], unless_there: bool = False
    ) -> None:
        """Inserts rows of these columns. unless_there: leave out those that a unique index has already."""
        if not rows:
            return
        names = ", ".join(f'"{name}"' for name in columns)
        marks = ", ".join("?" * len(rows[0]))
        end = " ON CONFLICT DO NOTHING" if unless_there else ""
        self._cursor.executemany(self._text(f"INSERT INTO {table} ({names}) VALUES ({marks}){end}"), rows)

    def time(self, value: datetime) -> Any:
        """A time as this database's columns take it."""
        return time_text(value) if self._sqlite else value

    def time_of(self, text: str) -> Any:
        """`time` of one that is written as records write it."""
        return text if self._sqlite else parse_time(text, "time")

    def among(self, statement: str, values: Iterable[Any], before: Sequence[Any] = ()) -> Iterator[Row]:
        """The rows of a statement that ends in `IN`, for all these values; databases limit how many at once."""
        for part in _parts(values):
            yield from self.rows(f"{statement} ({', '.join('?' * len(part))})", [*before, *part])

    def delete(self, table: str, column: str, values: Iterable[Any]) -> None:
        """Deletes the rows that have one of these values in a column."""
        for part in _parts(values):
            self.run(f"DELETE FROM {table} WHERE {column} IN ({', '.join('?' * len(part))})", part)

    def has(self, table: str) -> bool:
        """Is there such a table?"""
        ours = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
        return bool(self.rows(ours if self._sqlite else "SELECT 1 WHERE to_regclass(?) IS NOT NULL", [table]))

    def mend_indexes(self) -> None:
        """Makes a SQLite file's indexes anew."""
        if self._sqlite:
            self.run("REINDEX")

    def new_ids(self, table: str, many: int) -> Sequence[int]:
        """Ids for rows that the caller, who alone writes, will insert."""
        if not self._sqlite:
            sequence = f"SELECT nextval(pg_get_serial_sequence('{table}', 'id')) FROM generate_series(1, ?)"
            return [int(number) for (number,) in self.rows(sequence, [many])]
        if table not in self._last:
            ((last,),) = self.rows(f"SELECT coalesce(max(id), 0) FROM {table}")
            self._last[table] = int(last)
        first = self._last[table] + 1
        self._last[table] += many
        return range(first, first + many)

    @property
    def by_bytes(self) -> str:
        """What has texts ordered by their bytes, on every server."""
        return "" if self._sqlite else ' COLLATE "C"'

    def _text(self, statement: str) -> str:
        return statement if self._sqlite else statement.replace("?", "%s")


def _parts(values: Iterable[Any]) -> Iterator[Sequence[Any]]:
    wanted = list(values)
    return (wanted[start : start + _PART] for start in range(0, len(wanted), _PART))
