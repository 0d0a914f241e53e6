"""Which schema a registry has, and bringing it to this version's. Alembic is imported only when there is work."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from tilebook.errors import RegistryError
from tilebook.registry import backend, filewriter, sqlitefile
from tilebook.registry.backend import connect_sqlite, make_engine
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Target

VERSION_TABLE = "tilebook_alembic_version"
# Alembic's `op` and `context` are global, so upgrades of one process go one after the other.
_upgrading = threading.Lock()


def version(connection: Connection) -> int | None:
    """The schema version of a connected registry; None where there is none yet."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one()) or None
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar_one_or_none()
    if found is None:
        return None
    return int(found) if str(found).isdecimal() else SCHEMA_VERSION + 1


def check(found: int | None, target: Target, oldest: int | None = None) -> None:
    """Raises RegistryError unless the schema is this version's, or one from `oldest` on."""
    sqlitefile.refuse_version(found, target.label, SCHEMA_VERSION if oldest is None else oldest, SCHEMA_VERSION)


@dataclass(frozen=True)
class Found:
    """What a reader found: the schema's version, what is damaged of a SQLite file's structure, "" for nothing, and
    where the file is that is read: a copy, where a process died in mid-write."""

    version: int
    damage: str = ""
    place: Path | None = None


def open_reader(target: Target, cleanup: ExitStack, wait_s: float | None = None) -> tuple[Engine, Found]:
    """An engine that only reads a registry that exists and has a readable schema, and what it found.

    What the engine needs for as long as it is used is undone by `cleanup`.
    """
    if target.path is None:
        engine = make_engine(target, write=False, wait_s=wait_s)
        with engine.begin() as connection:
            number = version(connection)
        check(number, target, OLDEST_READABLE)
        assert number is not None
        return engine, Found(number)
    place = cleanup.enter_context(sqlitefile.readable(target.path))
    with closing(connect_sqlite(place, "ro", wait_s)) as raw:
        sqlitefile.begin(raw)
        sqlitefile.refuse_foreign_schema(raw, target.path)
        found = sqlitefile.check_version(raw, target.path, OLDEST_READABLE, SCHEMA_VERSION)
        _check_tables(sqlitefile.tables(raw), target, found)
        damage = sqlitefile.damage(raw, place, backend.READER_CHECKS_BYTES)
    return make_engine(replace(target, path=place), write=False, wait_s=wait_s), Found(found, damage, place)


def open_writer(target: Target, wait_s: float | None = None, upgrade: bool = True) -> Engine:
    """An engine that writes; the database is created or upgraded first, under the lock that every writer takes.

    upgrade: else one that is not as it should be is refused. Raises RegistryError.
    """
    if target.path is not None:
        filewriter.unlock(target.path, backend.WRITER_WAIT_S if wait_s is None else wait_s)
    with make_engine(target, write=True, create=upgrade, wait_s=wait_s).begin() as connection:
        if not _ready(connection, target, upgrade):
            if not upgrade:
                raise RegistryError(f"registry {target.label} has not the schema of today")
            with _upgrading:
                _upgrade(connection)
            if target.path is not None:
                filewriter.stamp(_raw(connection))
                _check_tables(sqlitefile.tables(_raw(connection)), target, SCHEMA_VERSION)
    return make_engine(target, write=True, wait_s=wait_s)


def _ready(connection: Connection, target: Target, make: bool) -> bool:
    """Has it today's schema? Asked under the lock: since the file was looked at, another process may have created or
    replaced it."""
    if target.path is not None:
        return filewriter.prepared(_raw(connection), target.path, make)
    found = version(connection)
    if found is not None and found > SCHEMA_VERSION:
        check(found, target)
    return found == SCHEMA_VERSION


def _raw(connection: Connection) -> sqlite3.Connection:
    raw = connection.connection.dbapi_connection
    assert isinstance(raw, sqlite3.Connection)
    return raw


def _check_tables(found: Collection[str], target: Target, version: int) -> None:
    if not sqlitefile.tables_of(version) <= set(found):
        raise RegistryError(f"registry {target.label} is corrupt: its tables are not those of a tilebook registry")


def _upgrade(connection: Connection, revision: str = "head") -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    script = str(resources.files("tilebook.registry") / "migrations")
    config.set_main_option("script_location", script.replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["version_table"] = VERSION_TABLE
    command.upgrade(config, revision)
