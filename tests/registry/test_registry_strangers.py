"""Files that are no registry, and registries with something in them that would be run: refused, and left alone."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest
from registry_samples import H200, execute, fill

from tilebook.registry import Registry, RegistryError, serving, ship


def _foreign_text(path: Path) -> None:
    path.write_bytes(b"# someone's notes, longer than a header\n" * 10)


def _foreign_short(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


def _foreign_database(path: Path) -> None:
    execute(path, "CREATE TABLE studies (id INTEGER)", "INSERT INTO studies VALUES (1)")


def _foreign_wal_database(path: Path) -> None:
    execute(path, "PRAGMA journal_mode=WAL", "CREATE TABLE trial (id INTEGER)")


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("make", [_foreign_text, _foreign_short, _foreign_database, _foreign_wal_database])
def test_a_foreign_file_is_refused_and_untouched(path: Path, make: object, write: bool) -> None:
    make(path)  # type: ignore[operator]
    before = (path.read_bytes(), path.stat().st_mtime_ns, os.listdir(path.parent))
    with pytest.raises(RegistryError, match=r"foreign|not a tilebook registry") as caught:
        Registry.open(path, write=write)
    assert "\n" not in str(caught.value)
    assert (path.read_bytes(), path.stat().st_mtime_ns, os.listdir(path.parent)) == before
    with Registry.open(path.with_name("other.db"), write=True) as other, pytest.raises(RegistryError):
        ship(other, path)
    assert path.read_bytes() == before[0]


def _redefine(path: Path, table: str, old: str, new: str) -> None:
    """Changes the definition of a table behind SQLite's back."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA writable_schema=ON")
    changed = connection.execute(
        "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE type = 'table' AND name = ? AND instr(sql, ?)",
        [old, new, table, old],
    )
    assert changed.rowcount == 1
    connection.close()


ENDLESS = "(WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n) SELECT max(id) AS id FROM n)"


SLOW = "instr(hex(zeroblob(20000000)), hex(zeroblob(10000000)) || '1') > 0"


def _view(path: Path) -> None:
    execute(path, "PRAGMA foreign_keys=OFF", "DROP TABLE verdict", f"CREATE VIEW verdict AS SELECT * FROM {ENDLESS}")


def _trigger(path: Path) -> None:
    execute(path, "CREATE TRIGGER t AFTER INSERT ON trial BEGIN DELETE FROM verdict; END")


def _generated_column(path: Path) -> None:
    _redefine(path, "verdict", "origin VARCHAR(64) NOT NULL", f"origin TEXT GENERATED ALWAYS AS ({SLOW}) VIRTUAL")


def _unnamed_generated_column(path: Path) -> None:
    _redefine(path, "trial", "reason TEXT NOT NULL", f"reason as({SLOW})")


def _check(path: Path) -> None:
    _redefine(path, "trial", "reason TEXT NOT NULL", f"reason TEXT NOT NULL CHECK ({SLOW})")


def _default(path: Path) -> None:
    _redefine(path, "trial", "reason TEXT NOT NULL", f"reason TEXT NOT NULL DEFAULT ({SLOW})")


def _index_on_an_expression(path: Path) -> None:
    execute(path, "CREATE INDEX i ON trial (abs(id))")


def _virtual_table(path: Path) -> None:
    execute(path, "CREATE VIRTUAL TABLE notes USING fts5(reason)")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _fifo_for_a_journal(path: Path) -> None:
    os.mkfifo(path.with_name(path.name + "-journal"))


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        _view,
        _trigger,
        _generated_column,
        _unnamed_generated_column,
        _check,
        _default,
        _index_on_an_expression,
        _virtual_table,
        _fifo,
        _fifo_for_a_journal,
        _directory,
    ],
)
def test_nothing_that_a_stranger_made_to_run_is_run(path: Path, spoil: object) -> None:
    fill(path)
    spoil(path)  # type: ignore[operator]
    began = time.monotonic()
    for write in (False, True):
        with pytest.raises(RegistryError, match=r"corrupt|not a regular file|Is a directory"):
            Registry.open(path, write=write)
    table = serving.read(H200.name, H200.arch, H200.sm_count, str(path))
    assert [each for each in table.verdicts("rms_norm_fwd") if each.layer == "explicit"] == []
    assert len(table.problems) == 1
    assert time.monotonic() - began < 1
