"""Readers beside a writer: what SQLite takes for a fault, and is none."""

import sqlite3
from contextlib import closing

import pytest
from registry_samples import H200, verdict

from tilebook.errors import RegistryError
from tilebook.registry import Registry, serving, sqlitefile
from tilebook.registry.filereader import FileReader
from tilebook.registry.readers import File
from tilebook.registry.target import Locked


class Unlucky(sqlite3.Connection):
    """One that meets a journal just as its writer ends, so many times."""

    times = 0

    def execute(self, statement, *values):
        if statement.startswith("SELECT count(*) FROM sqlite_master") and Unlucky.times > 0:
            Unlucky.times -= 1
            error = sqlite3.OperationalError("attempt to write a readonly database")
            error.sqlite_errorname = "SQLITE_READONLY_ROLLBACK"
            raise error
        return super().execute(statement, *values)


@pytest.fixture
def unlucky(path, monkeypatch):
    with Registry.open(path, write=True) as registry:
        registry.record(verdict=verdict())
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, **{"factory": Unlucky, **more}))
    return path


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_journal_that_is_gone_at_the_next_look_is_no_fault(unlucky, times):
    Unlucky.times = times
    with Registry.open(unlucky) as registry:
        assert registry.verdicts() == [verdict()]
    Unlucky.times = times
    with FileReader.open(unlucky) as reading:
        assert reading.verdicts() == [verdict()]
    Unlucky.times = times
    table = serving.read(H200.name, H200.arch, H200.sm_count, str(unlucky))
    assert [each.layer for each in table.verdicts("rms_norm_fwd")][:1] == ["explicit"]
    assert table.problems == []


def test_one_that_stays_is_one_clear_line(unlucky):
    Unlucky.times = 9
    with pytest.raises(RegistryError, match="cannot open registry"):
        FileReader.open(unlucky)
    with closing(sqlitefile.connect(unlucky, "ro", 0)) as connection:
        Unlucky.times = 0
        sqlitefile.begin(connection)
        assert connection.in_transaction


def test_a_reader_that_meets_a_lock_looks_again_soon_and_no_longer_than_it_may(path, monkeypatch):
    with Registry.open(path, write=True) as registry:
        registry.record(verdict=verdict())
    slept = []
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlitefile.time, "sleep", slept.append)
        with pytest.raises(Locked):
            File("explicit", path, 0.05).verdicts("rms_norm_fwd", H200)

        def released(seconds):
            slept.append(seconds)
            if len(slept) == 5:
                writer.execute("ROLLBACK")

        slept.clear()
        monkeypatch.setattr(sqlitefile.time, "sleep", released)
        assert File("explicit", path, 20.0).verdicts("rms_norm_fwd", H200) is not None
    assert len(slept) == 5
    assert 0.0 < min(slept) <= max(slept) < 0.005
