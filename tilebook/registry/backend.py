"""How a registry is reached through SQLAlchemy: a SQLite file or a PostgreSQL database, and one clear line when that
fails."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from tilebook.errors import RegistryError
from tilebook.registry import postgresql, sqlitefile
from tilebook.registry.target import APPLICATION_ID, Locked, Target, Unreachable, sniff

__all__ = ["APPLICATION_ID", "RegistryError", "Target", "connect_sqlite", "explained", "make_engine", "sniff"]

WRITER_WAIT_S = 30.0
READER_WAIT_S = 1.0
READER_CHECKS_BYTES = sqlitefile.READER_CHECKS_BYTES
_ADVISORY_LOCK = 0x74696C65626F6F6B  # "tilebook": one writer at a time on PostgreSQL too


def connect_sqlite(path: Path, mode: str, wait_s: float | None = None) -> sqlite3.Connection:
    """`sqlitefile.connect`, with the wait for a lock that is usual for the mode."""
    usual = READER_WAIT_S if mode == "ro" else WRITER_WAIT_S
    return sqlitefile.connect(path, mode, usual if wait_s is None else wait_s)


def make_engine(target: Target, *, write: bool, create: bool = False, wait_s: float | None = None) -> Engine:
    """No pool: a connection lives for one operation, so forks and threads share nothing and no file stays open.

    wait_s: how long to wait for another process's lock; None for what is usual.
    """
    if target.path is not None:
        path, mode = target.path, ("rwc" if create else "rw") if write else "ro"
        engine = create_engine("sqlite://", creator=lambda: connect_sqlite(path, mode, wait_s), poolclass=NullPool)

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            raw: Any = connection.connection.dbapi_connection
            if write:
                sqlitefile.begin_writing(raw, WRITER_WAIT_S if wait_s is None else wait_s)
            else:
                sqlitefile.begin(raw)

        return engine
    assert target.url is not None
    return _postgresql(target, target.url, write, wait_s)


def _postgresql(target: Target, url: URL, write: bool, wait_s: float | None) -> Engine:
    """Whoever cannot wait for a lock cannot wait for a server either: then it has half a second to answer, and a
    second for each statement. Others give it ten, and ten minutes."""
    usual = WRITER_WAIT_S if write else READER_WAIT_S
    wait_ms = max(1, int(1000 * (usual if wait_s is None else wait_s)))  # 0 would be for ever
    answer_s, statement_ms = (10.0, 600_000) if wait_s is None else (max(0.1, min(0.5, wait_s)), 1_000)
    try:
        engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": math.ceil(answer_s)})
    except ModuleNotFoundError as error:
        raise RegistryError(f"registry {target.label} needs psycopg: pip install 'psycopg[binary]'") from error

    @event.listens_for(engine, "do_connect")
    def ask(dialect: object, record: object, arguments: object, parameters: dict[str, Any]) -> None:
        postgresql.demand_answer(target.label, parameters.get("host"), parameters.get("port"), answer_s)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        limits = f"SET LOCAL lock_timeout = {wait_ms}; SET LOCAL statement_timeout = {statement_ms}"
        connection.exec_driver_sql(limits if write else f"SET TRANSACTION READ ONLY; {limits}")
        if write:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")

    return engine


@contextlib.contextmanager
def explained(target: Target) -> Iterator[None]:
    """Turns what the driver raises into a RegistryError of one line."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise _explanation(target, error) from error
    except UnicodeError as error:
        # sqlite3 stumbles over its own message when that quotes a damaged schema.
        raise RegistryError(f"registry {target.label} is corrupt: it holds text that is not UTF-8") from error
    except Exception as error:
        if not type(error).__module__.startswith("psycopg"):  # which is here only where it is needed
            raise
        raise _explanation(target, error) from error


def _is_gone(cause: Exception, text: str) -> bool:
    """Was the connection lost, or is the server starting or stopping? Not where it has answered with a refusal."""
    state = getattr(cause, "sqlstate", None)
    if state is not None:
        return state[:2] == "08" or state in ("57P01", "57P02", "57P03")
    refused = "FATAL" in text and "starting up" not in text and "shutting down" not in text
    return "OperationalError" in (each.__name__ for each in type(cause).__mro__) and not refused


def _explanation(target: Target, error: Exception) -> RegistryError:
    cause = getattr(error, "orig", None) or error
    if target.path is not None:
        return sqlitefile.explanation(target.path, cause)
    first = str(cause).strip().partition("\n")[0]
    if _is_gone(cause, first):
        return Unreachable(f"registry {target.label} cannot be reached: {first}")
    if "lock timeout" in first.lower():
        return Locked(f"registry {target.label} is locked by another process")
    return RegistryError(f"registry {target.label} failed: {first}")
