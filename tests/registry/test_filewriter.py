"""Files written without SQLAlchemy: as `Registry` writes them, by commands that only move records."""

from __future__ import annotations

import io
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from old_registry import make_old, old_verdicts
from registry_samples import KERNEL, execute, trial, verdict

from tilebook.registry import Registry, RegistryError, Revocation, export
from tilebook.registry.exchange import import_rule
from tilebook.registry.filewriter import FileWriter, writer
from tilebook.registry.texts import Written
from tilebook.registry.verdict import Verdict

REVOCATION = Revocation("rms_norm_fwd", "triton", "wrong at M = 1", KERNEL)


def exported(path: Path) -> str:
    stream = io.StringIO()
    with Registry.open(path) as registry:
        export(registry, stream)
    return stream.getvalue()


def pour(path: Path, *verdicts: Verdict) -> None:
    with writer(str(path)) as target:
        target.pour([trial(1), *map(Written, verdicts), REVOCATION], rule=import_rule, origin="imported")


def test_it_writes_what_the_registry_writes(tmp_path: Path) -> None:
    mine, other = tmp_path / "a folder" / "mine.db", tmp_path / "other.db"
    pour(mine, verdict())
    with Registry.open(other, write=True) as registry:
        registry.pour([trial(1), Written(verdict()), REVOCATION], rule=import_rule, origin="imported")
    assert exported(mine) == exported(other)
    with sqlite3.connect(mine) as one, sqlite3.connect(other) as two:
        assert list(one.iterdump()) == list(two.iterdump())


def test_one_of_an_older_schema_is_brought_to_todays(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    make_old(str(path), old_verdicts())
    assert FileWriter.open(path) is None
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)
    pour(path, verdict())
    with Registry.open(path) as registry:
        assert len(registry.verdicts()) == 1 + len(old_verdicts())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"a letter"),
        lambda path: execute(path, "DROP TABLE miss"),
        lambda path: execute(path, "DROP TABLE position"),
        lambda path: execute(path, "PRAGMA user_version = 99"),
        lambda path: execute(path, "PRAGMA application_id = 7"),
        lambda path: execute(path, "CREATE VIEW v AS SELECT 1"),
    ],
)
def test_it_refuses_what_the_registry_refuses(path: Path, spoil: object) -> None:
    pour(path)
    spoil(path)  # type: ignore[operator]
    before = path.read_bytes()
    said = []
    for opened in (lambda: FileWriter.open(path), lambda: Registry.open(path, write=True)):
        with pytest.raises(RegistryError) as refused:
            opened()
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert path.read_bytes() == before


def test_what_is_raised_in_the_middle_undoes_all(path: Path) -> None:
    pour(path)
    before = exported(path)

    def broken() -> object:
        yield Written(verdict())
        raise RegistryError("line 3 of the import")

    with writer(str(path)) as target, pytest.raises(RegistryError, match="line 3"):
        target.pour(broken(), rule=import_rule, origin="imported")  # type: ignore[arg-type]
    assert exported(path) == before


def test_it_waits_for_another_writer(path: Path) -> None:
    pour(path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, other.rollback).start()
    began = time.monotonic()
    pour(path, verdict())
    assert 0.2 < time.monotonic() - began < 5
    other.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE finalist SET samples_ms = '[1.0]' WHERE place = 0",
        "DELETE FROM finalist",
        "UPDATE verdict SET served = 'none'",
        "UPDATE verdict SET notes = '{'",
    ],
)
def test_a_damaged_verdict_gives_way_to_the_same_one_though_its_digest_stands_there(path: Path, damage: str) -> None:
    pour(path, verdict())
    before = exported(path)
    execute(path, damage)
    assert exported(path) != before
    pour(path, verdict())
    assert exported(path) == before
