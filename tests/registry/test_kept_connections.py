"""What dispatch reads of a file: one connection for many readings, and a new one where anything has changed."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from registry_samples import H200, KERNEL, execute, problem, verdict

from tilebook.registry import Registry
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
