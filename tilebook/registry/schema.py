"""Which schema a registry has, and bringing it to this version's. Alembic is imported only when there is work."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import closing
from importlib import resources

from sqlalchemy import Connection, Engine, inspect, text

from tilebook.registry.backend import (
    APPLICATION_ID,
    RegistryError,
    Target,
    connect_sqlite,
    damage,
    make_engine,
    sniff,
)
from tilebook.registry.models import Base, RevocationRow

# The revision of the newest migration as a number; migrations are named 0001, 0002, ...
SCHEMA_VERSION = 2
OLDEST_READABLE = 1  # what came later is a table of its own, which readers of an older registry find empty
VERSION_TABLE = "tilebook_alembic_version"


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


def has_revocations(connection: Connection) -> bool:
    """Whether the registry has the table that schema 2 added; the table itself is asked, for a version may be wrong."""
    return inspect(connection).has_table(RevocationRow.__tablename__)


def check(found: int | None, target: Target, oldest: int = SCHEMA_VERSION) -> None:
    """Raises RegistryError unless the schema is one from `oldest` to this version's."""
    if found is None:
        raise RegistryError(f"{target.label} is not a tilebook registry")
    if found > SCHEMA_VERSION:
        raise RegistryError(
            f"registry {target.label} has schema {found}, newer than {SCHEMA_VERSION}: it needs a newer tilebook"
        )
    if found < oldest:
        raise RegistryError(
            f"registry {target.label} has schema {found}, older than {oldest}:"
            " opening it for writing (tilebook tune) upgrades it"
        )


_upgrading = threading.Lock()
"""Alembic keeps the migration under way in module globals: one thread at a time may have one."""


def open_reader(target: Target) -> tuple[Engine, str]:
    """An engine that can only read, for a registry that exists and has a readable schema, and its `damage`."""
    if target.path is not None:
        header = sniff(target)
        if header is None:
            raise RegistryError(f"there is no registry at {target.label}")
        if header.wal:
            raise RegistryError(
                f"registry {target.label} is in WAL mode, which cannot be read without creating files:"
                " open it once for writing"
            )
    engine = make_engine(target, write=False)
    with engine.begin() as connection:
        found = version(connection)
        check(found, target, OLDEST_READABLE)
        _check_tables(connection, target, optional=() if found == SCHEMA_VERSION else (RevocationRow.__tablename__,))
        return engine, damage(connection, target, write=False)


def open_writer(target: Target) -> Engine:
    """An engine that writes; the database is created or upgraded first, under the lock that every writer takes."""
    if target.path is not None:
        header = sniff(target)
        if header is None:
            target.path.parent.mkdir(parents=True, exist_ok=True)
        elif header.wal:
            with closing(connect_sqlite(target.path, "rw")) as raw:
                raw.execute("PRAGMA journal_mode=DELETE")
    with make_engine(target, write=True, create=True).begin() as connection:
        if found := damage(connection, target, write=True):
            raise RegistryError(
                f"registry {target.label} is corrupt: {found}; export what is left of it and import that into a new one"
            )
        if _needs_upgrade(connection, target):
            with _upgrading:
                _upgrade(connection)
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
        _check_tables(connection, target)
    return make_engine(target, write=True)


def _needs_upgrade(connection: Connection, target: Target) -> bool:
    """Asked again under the lock: since the file was looked at, another process may have created or replaced it."""
    if connection.dialect.name == "sqlite":
        identity = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        empty = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one() == 0
        if identity != APPLICATION_ID and not (identity == 0 and empty):
            raise RegistryError(f"{target.label} is a SQLite database, but not a tilebook registry")
    found = version(connection)
    if found is not None and found > SCHEMA_VERSION:
        check(found, target)
    return found != SCHEMA_VERSION


def _check_tables(connection: Connection, target: Target, optional: Collection[str] = ()) -> None:
    """A view may stand where a table should and never return; names and kinds are checked before any is read."""
    if connection.dialect.name != "sqlite":
        return
    rows = connection.exec_driver_sql("SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view', 'trigger')")
    found = {(kind, name) for kind, name in rows}
    extra = {name for kind, name in found if kind != "table"}
    missing = {name for name in Base.metadata.tables if ("table", name) not in found and name not in optional}
    if extra or missing:
        raise RegistryError(f"registry {target.label} is corrupt: its tables are not those of a tilebook registry")


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    script = str(resources.files("tilebook.registry") / "migrations")
    config.set_main_option("script_location", script.replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["version_table"] = VERSION_TABLE
    command.upgrade(config, "head")
