"""Counting misses as a program ends: what Registry.count_misses does, without a wait and with the standard library."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from old_registry import make_old, old_verdicts
from registry_samples import A100, START, evidenced, miss

import tilebook.registry
from tilebook.dispatch.misses import store_misses
from tilebook.registry import Locked, Registry, RegistryError, ledger, serving
from tilebook.registry.records import Guess

REPOSITORY = Path(tilebook.registry.__file__).parents[2]
LATER = START + timedelta(days=1)
FIRST = [miss(1, calls=5), miss(2, calls=2, time_ms=100.0), miss(3, device=A100)]
SECOND = [miss(1, calls=7, time_ms=2.0, last_seen=LATER), miss(4)]


def misses(path: Path) -> list[object]:
    with Registry.open(path) as registry:
        assert registry.problems == []
        return list(registry.misses())


def test_the_ledger_is_that_of_the_registry(path: Path) -> None:
    by_registry = path.with_name("other.db")
    Registry.open(path, write=True).close()
    for some in (FIRST, SECOND):
        ledger.add(path, some, 0)
        with Registry.open(by_registry, write=True) as registry:
            registry.count_misses(some)
    assert misses(path) == misses(by_registry)
    with Registry.open(path, write=True) as registry:
        registry.count_misses(FIRST)
    assert miss(1, calls=17, time_ms=2.0, last_seen=LATER) in misses(path)


def test_a_damaged_entry_is_replaced(path: Path) -> None:
    Registry.open(path, write=True).close()
    ledger.add(path, FIRST[:1], 0)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE miss SET calls = 99")
    ledger.add(path, FIRST[:1], 0)
    assert misses(path) == FIRST[:1]


def test_a_registry_of_an_older_schema_keeps_it(path: Path) -> None:
    make_old(str(path), old_verdicts())
    ledger.add(path, FIRST, 0)
    assert len(misses(path)) == 3
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (2,)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(tmp_path / "mine.db"))
    return tmp_path


def test_a_lock_costs_a_fifth_of_a_second_at_most(home: Path) -> None:
    path = home / "mine.db"
    with Registry.open(path, write=True) as registry:
        registry.record(verdict=evidenced())
    writer = sqlite3.connect(path, isolation_level=None)
    for lock in ("BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"):
        writer.execute(lock)
        began = time.monotonic()
        store_misses(FIRST)
        assert not ledger.count(FIRST, 0)
        assert time.monotonic() - began < 0.2
        with pytest.raises(Locked):
            ledger.add(path, FIRST, 0)
        with pytest.raises(Locked):
            Registry.open(path, write=True, wait_s=0)
        writer.execute("ROLLBACK")
    assert misses(path) == []
    store_misses(FIRST)
    assert len(misses(path)) == 3


def test_a_lock_and_then_a_reader_cost_no_more_than_one_of_them(home: Path) -> None:
    path = home / "mine.db"
    Registry.open(path, write=True).close()
    writer, reader = (sqlite3.connect(path, isolation_level=None, check_same_thread=False) for _ in range(2))
    writer.execute("BEGIN IMMEDIATE")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM miss").fetchall()
    release = threading.Timer(0.4, writer.rollback)
    release.start()
    began = time.monotonic()
    with pytest.raises(Locked):
        ledger.add(path, FIRST, 0.5)
    assert time.monotonic() - began < 0.75
    release.join()
    reader.rollback()
    ledger.add(path, FIRST, 0.5)
    assert len(misses(path)) == 3


def test_misses_go_to_the_first_registry_that_is_there(home: Path) -> None:
    assert not ledger.count(FIRST)
    assert not (home / "mine.db").exists()
    user = home / "data" / "tilebook" / "registry.db"
    Registry.open(user, write=True).close()
    assert ledger.count(FIRST)
    assert len(misses(user)) == 3
    Registry.open(home / "mine.db", write=True).close()
    assert ledger.count(FIRST)
    assert (len(misses(user)), len(misses(home / "mine.db"))) == (3, 3)


@pytest.mark.parametrize("content", [b"", b"notes, longer than the header of a registry" * 4])
def test_what_is_no_registry_is_left_alone(home: Path, content: bytes) -> None:
    (home / "mine.db").write_bytes(content)
    assert not ledger.count(FIRST)
    with pytest.raises(RegistryError):
        ledger.add(home / "mine.db", FIRST, 0)
    assert (home / "mine.db").read_bytes() == content


def test_counting_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; from tilebook.registry import ledger;"
        "sys.exit(sorted({'sqlalchemy', 'platformdirs', 'alembic', 'torch', 'triton'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_what_cannot_be_written_gives_way_to_the_next_registry(home: Path) -> None:
    user = home / "data" / "tilebook" / "registry.db"
    for place in (user, home / "mine.db"):
        Registry.open(place, write=True).close()
    with sqlite3.connect(home / "mine.db") as database:
        database.execute("PRAGMA user_version=99")  # of a newer tilebook: root may write any file
    assert ledger.count(FIRST)
    assert len(misses(user)) == 3


def test_a_server_that_the_program_speaks_to_has_a_ledger(
    home: Path, postgres_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEBOOK_REGISTRY", postgres_target)
    assert not ledger.count(FIRST, 5.0), "the database is there, and no registry yet"
    Registry.open(postgres_target, write=True).close()
    assert ledger.count(FIRST, 5.0)
    assert ledger.count(SECOND, 5.0)
    with Registry.open(postgres_target) as registry:
        assert registry.misses()[0] == miss(2, calls=2, time_ms=100.0)
        assert len(registry.misses()) == 4


def test_a_server_that_does_not_answer_is_waited_for_briefly(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    user = home / "data" / "tilebook" / "registry.db"
    Registry.open(user, write=True).close()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("TILEBOOK_REGISTRY", f"postgresql://x@127.0.0.1:{deaf.getsockname()[1]}/x")
        began = time.monotonic()
        assert ledger.count(FIRST)
        assert time.monotonic() - began < 1.5
    assert len(misses(user)) == 3


def test_dispatch_does_without_a_server_that_does_not_answer(home: Path) -> None:
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        target = f"postgresql://x@127.0.0.1:{deaf.getsockname()[1]}/x"
        table = serving.read("NVIDIA H200", "sm_90", 132, target)
        assert not [each for each in table.verdicts("rms_norm_fwd") if each.layer == "explicit"]
        assert [line for line in table.problems if "does not answer within" in line]
        assert not table.locked, "it is not waited for again"
        deaf.settimeout(0)
        deaf.accept()
        with pytest.raises(BlockingIOError):
            deaf.accept()


def test_what_was_timed_is_not_replaced_by_a_guess(path: Path) -> None:
    def guess(calls: int, last_seen: datetime) -> Guess:
        return Guess(miss().op, miss().problem, miss().device, calls, 9.0, last_seen)

    Registry.open(path, write=True).close()
    day = timedelta(days=1)
    for each in (guess(5, START), miss(calls=2, time_ms=7.0, last_seen=LATER), guess(3, LATER + day)):
        ledger.add(path, [each], 0)
    assert misses(path) == [miss(calls=10, time_ms=7.0, last_seen=LATER + day)]
    with Registry.open(path, write=True) as registry:
        registry.count_misses([guess(1, LATER + 2 * day)])
        registry.count_misses([miss(calls=1, time_ms=6.0, last_seen=LATER + 3 * day)])
    assert misses(path) == [miss(calls=12, time_ms=6.0, last_seen=LATER + 3 * day)]
