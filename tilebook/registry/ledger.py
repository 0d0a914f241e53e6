"""Counting misses as a program ends: at once or not at all, with the standard library alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from pathlib import Path

from tilebook.errors import RegistryError
from tilebook.registry import sqlitefile
from tilebook.registry.layers import Layers
from tilebook.registry.records import Miss
from tilebook.registry.sql import Sql
from tilebook.registry.tally import tally
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Locked, Target, sniff

WAIT_S = 0.06
"""How long a program that ends may wait for another that writes."""

# More than this is not checked as a whole first: a program's end must not wait for that either.
_CHECKED_BYTES = 4 << 20


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
    header = sniff(path)
    if header is None or header.wal:
        raise RegistryError(f"there is no registry to write to at {path}")
    with sqlitefile.explained(path), contextlib.closing(sqlitefile.connect(path, "rw", wait_s)) as connection:
        sqlitefile.begin_writing(connection, wait_s)
        sqlitefile.refuse_foreign_schema(connection, path)
        sqlitefile.check_version(connection, path, OLDEST_READABLE, SCHEMA_VERSION)
        if found := sqlitefile.damage(connection, path, _CHECKED_BYTES):
            raise RegistryError(f"registry {path} is corrupt: {found}")
        tally(Sql(connection), misses)
        connection.execute("COMMIT")
