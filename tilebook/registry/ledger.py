"""Counting misses as a program ends: at once or not at all, with the standard library alone."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tilebook.errors import RegistryError
from tilebook.registry import sqlitefile
from tilebook.registry.checks import DAMAGE, time_text
from tilebook.registry.codec import miss_from
from tilebook.registry.layers import Layers
from tilebook.registry.records import Miss
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Locked, Target, sniff

WAIT_S = 0.1
"""How long a program that ends may wait for another that writes."""

# More than this is not checked as a whole first: a program's end must not wait for that either.
_CHECKED_BYTES = 64 << 20


def count(misses: Iterable[Miss], wait_s: float = WAIT_S) -> bool:
    """Adds misses to the ledger of the first registry of one's own that exists and can be written; whether it could.

    Where there is none, or another process holds its lock, they are dropped: they are counted again in the next run.
    A database server is asked where it answers at once, and where the program has spoken to one before: what it takes
    to speak to it is loaded then.
    """
    counted = list(misses)
    for name, target in Layers.default().layers:
        if name == "shipped" or not counted:
            continue
        try:
            place = Target.parse(target).path
            if place is None:
                _add_to_database(target, counted, wait_s)
                return True
            if place.exists():
                add(place, counted, wait_s)
                return True
        except Locked:
            return False
        except RegistryError:
            continue  # what cannot be written has no ledger; the next may have one
    return False


def _add_to_database(target: str, misses: Iterable[Miss], wait_s: float) -> None:
    if "psycopg" not in sys.modules:
        raise RegistryError("the program has asked no server for anything")
    from tilebook.registry.store import Registry

    with Registry.open(target, write=True, wait_s=wait_s, upgrade=False) as registry:
        registry.count_misses(misses)


def add(path: Path, misses: Iterable[Miss], wait_s: float) -> None:
    """As `Registry.count_misses`, of a SQLite file that has a schema. Raises RegistryError; Locked after `wait_s`."""
    header, until = sniff(path), time.monotonic() + wait_s
    if header is None or header.wal:
        raise RegistryError(f"there is no registry to write to at {path}")
    with sqlitefile.explained(path), contextlib.closing(sqlitefile.connect(path, "rw", wait_s)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        sqlitefile.refuse_foreign_schema(connection, path)
        sqlitefile.check_version(connection, path, OLDEST_READABLE, SCHEMA_VERSION)  # no schema has changed this table
        if found := sqlitefile.damage(connection, path, _CHECKED_BYTES):
            raise RegistryError(f"registry {path} is corrupt: {found}")
        for miss in misses:
            _add(connection, miss)
        # What is left of the wait is for readers to leave; they are brief.
        connection.execute(f"PRAGMA busy_timeout={max(20, int(1e3 * (until - time.monotonic())))}")
        connection.execute("COMMIT")


def _add(connection: sqlite3.Connection, miss: Miss) -> None:
    ids = (
        _id(connection, "problem", op=miss.op, key=miss.problem),
        _id(connection, "device", **miss.device.content()),
    )
    where = "WHERE problem_id = ? AND device_id = ?"
    row = connection.execute(f"SELECT calls, time_ms, last_seen, sha256 FROM miss {where}", ids).fetchone()
    known = None if row is None else _known(miss, row)
    whole = miss if known is None else miss.plus(known)
    connection.execute(f"DELETE FROM miss {where}", ids)
    connection.execute(
        "INSERT INTO miss (problem_id, device_id, sha256, calls, time_ms, last_seen) VALUES (?, ?, ?, ?, ?, ?)",
        [*ids, whole.sha256, whole.calls, whole.time_ms, time_text(whole.last_seen)],
    )


def _known(miss: Miss, row: tuple[Any, ...]) -> Miss | None:
    """What the ledger has of this problem; None where the row is damaged."""
    calls, time_ms, last_seen, sha256 = row
    try:
        content = {**miss.content(), "calls": calls, "time_ms": time_ms, "last_seen": last_seen}
        found = miss_from(json.loads(json.dumps(content)))
    except DAMAGE:
        return None
    return found if found.sha256 == sha256 else None


def _id(connection: sqlite3.Connection, table: str, **columns: Any) -> int:
    names, values = list(columns), list(columns.values())
    where = " AND ".join(f'"{name}" = ?' for name in names)
    found = connection.execute(f"SELECT id FROM {table} WHERE {where}", values).fetchone()
    if found is not None:
        return int(found[0])
    quoted, marks = ", ".join(f'"{name}"' for name in names), ", ".join("?" * len(names))
    return int(connection.execute(f"INSERT INTO {table} ({quoted}) VALUES ({marks})", values).lastrowid or 0)
