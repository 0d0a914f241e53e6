"""What dispatch reads of a file: one connection for many readings, and a new one where anything has changed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from registry_samples import H200, KERNEL, execute, problem, verdict

from tilebook.registry import Registry, readers, sqlitefile
from tilebook.registry.lookup import Question
from tilebook.registry.readers import File
from tilebook.registry.target import Locked

OP = "rms_norm_fwd"


class Opened:
    """Counts the connections that are made, and those that are closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.closed = 0
        real, seen = sqlite3.connect, self

        class Connection(sqlite3.Connection):
            def close(self) -> None:
                seen.closed += 1
                super().close()

        def connect(*given: object, **more: object) -> sqlite3.Connection:
            self.made += 1
            return real(*given, **{"factory": Connection, **more})  # type: ignore[call-overload, no-any-return]

        monkeypatch.setattr(sqlite3, "connect", connect)


@pytest.fixture
def opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    with Registry.open(path, write=True) as registry:
        registry.record(verdict=verdict())
    return Opened(monkeypatch)


def ask(layer: File, rows: int = 128) -> object:
    return layer.answer(Question(OP, KERNEL, problem(rows)), H200).exact


def test_many_readings_have_one_connection(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    for _ in range(5):
        assert layer.revocations() == []
        assert layer.verdicts(OP, H200) != []
        assert ask(layer) is not None
    assert (opened.made, opened.closed) == (1, 0)


def test_a_reading_leaves_no_lock(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    with sqlite3.connect(path, timeout=0, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        other.execute("COMMIT")


def test_what_a_writer_has_added_is_there_at_the_next_reading(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer, 256) is None
    with Registry.open(path, write=True) as registry:
        registry.record(verdict=verdict(problem=problem(256)))
    assert ask(layer, 256) is not None


def test_another_file_in_its_place_is_looked_at_as_any_strangers(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    other = path.with_name("other.db")
    shutil.copy(path, other)
    execute(other, "CREATE VIEW v AS SELECT 1")
    other.replace(path)
    with pytest.raises(Exception, match="corrupt"):
        ask(layer)
    path.unlink()
    with pytest.raises(Exception, match="there is no registry"):
        ask(layer)


def test_where_a_writer_died_a_recovered_copy_is_read(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    pid = os.fork()
    if pid == 0:
        writing = sqlite3.connect(path, isolation_level=None)
        writing.execute("PRAGMA cache_size=1")
        writing.execute("BEGIN IMMEDIATE")
        writing.execute("DELETE FROM verdict")
        writing.execute("CREATE TABLE more AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 9999)"
                        " SELECT i, hex(randomblob(40)) AS t FROM n")  # fmt: skip
        os._exit(0)  # as if it were killed
    os.waitpid(pid, 0)
    assert path.with_name(path.name + "-journal").exists()
    assert ask(layer) is not None
    assert ask(layer) is not None


def test_a_fifo_for_a_journal_is_refused_and_waited_for_by_nobody(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    os.mkfifo(path.with_name(path.name + "-journal"))
    with pytest.raises(Exception, match="not a regular file"):
        ask(layer)


def test_a_lock_is_waited_for_once(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Locked):
        ask(layer)
    other.close()
    assert ask(layer) is not None


def test_a_forked_process_opens_the_file_for_itself(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    pid = os.fork()
    if pid == 0:
        os._exit(0 if ask(layer) is not None and (opened.made, opened.closed) == (2, 0) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert ask(layer) is not None
    assert opened.made == 1


def test_threads_do_not_share_one(path: Path, opened: Opened) -> None:
    layer, together = File("explicit", path, 5.0), threading.Barrier(4)

    def many(_: int) -> bool:
        together.wait()
        return all(ask(layer) is not None for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))
    assert opened.made - opened.closed == 1


def test_what_is_raised_in_a_reading_ends_its_connection(path: Path, opened: Opened) -> None:
    layer = File("explicit", path, 0.2)
    with pytest.raises(KeyboardInterrupt), layer._reading():
        raise KeyboardInterrupt
    assert (opened.made, opened.closed) == (1, 1)
    assert ask(layer) is not None


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is small enough to be looked at as a whole."""
    monkeypatch.setattr(readers, "CHECKED_BYTES", 0)


def test_a_large_file_that_a_writer_changes_is_not_opened_again(path: Path, opened: Opened, large: None) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer, 256) is None
    for rows in (256, 384):
        with Registry.open(path, write=True) as registry:
            registry.record(verdict=verdict(problem=problem(rows)))
        made = opened.made
        assert ask(layer, rows) is not None
        assert opened.made == made


def test_nor_is_one_to_which_somebody_is_writing(path: Path, opened: Opened, large: None) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("DELETE FROM verdict")
    assert path.with_name(path.name + "-journal").exists()
    made = opened.made
    assert ask(layer) is not None
    assert opened.made == made
    other.close()


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("CREATE VIEW v AS SELECT 1", "corrupt"),
        ("PRAGMA user_version=99", "newer"),
        ("PRAGMA journal_mode=WAL", "WAL mode"),
        ("PRAGMA application_id=7", "not a tilebook registry"),
    ],
)
def test_a_large_file_whose_schema_changes_is_looked_at_again(
    path: Path, opened: Opened, large: None, statement: str, told: str
) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    execute(path, statement)
    with pytest.raises(Exception, match=told):
        ask(layer)


def test_a_lock_on_a_large_file_is_waited_for_once(path: Path, opened: Opened, large: None) -> None:
    layer = File("explicit", path, 0.2)
    assert ask(layer) is not None
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    made, began = opened.made, time.monotonic()
    with pytest.raises(Locked):
        ask(layer)
    assert (opened.made, time.monotonic() - began < 0.4) == (made, True)
    other.close()
    assert ask(layer) is not None


def test_a_writer_looks_every_few_milliseconds_whether_another_is_done(
    path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 5:
            other.execute("ROLLBACK")

    monkeypatch.setattr(time, "sleep", sleep)
    with Registry.open(path, write=True) as registry:
        registry.record(verdict=verdict(problem=problem(256)))
    assert (len(waits), max(waits) <= 0.004) == (5, True)
    other.close()


def test_a_wait_for_a_lock_does_not_begin_anew_where_a_journal_seemed_to_be_nobodys() -> None:
    began = time.monotonic()

    class Odd:
        """Busy for a while, then once with a journal that nobody owns, and so on."""

        busy_until = began + 0.15

        def execute(self, statement: str) -> Odd:
            error = sqlite3.OperationalError()
            busy = time.monotonic() < self.busy_until
            error.sqlite_errorname = "SQLITE_BUSY" if busy else "SQLITE_CANTOPEN"
            self.busy_until += 0.0 if busy else 0.15
            raise error

    with pytest.raises(sqlite3.OperationalError):
        sqlitefile.begin(Odd(), 0.2)  # type: ignore[arg-type]
    assert time.monotonic() - began < 0.28
