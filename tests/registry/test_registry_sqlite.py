"""What is particular to files: strangers' files, locks, damage, dead writers, places that cannot be written."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from registry_samples import A100, H200, execute, fill, miss, predicted, problem, revocation, trial, verdict

import tilebook.registry
from tilebook.registry import Registry, RegistryError, held, serving, ship, sqlitefile
from tilebook.registry.backend import connect_sqlite
from tilebook.registry.target import sniff

REPOSITORY = Path(tilebook.registry.__file__).parents[2]


def test_a_reader_needs_a_registry_and_makes_none(path: Path) -> None:
    with pytest.raises(RegistryError, match="there is no registry"):
        Registry.open(path)
    with pytest.raises(RegistryError, match="there is no registry"):
        Registry.open(path.parent / "missing" / "registry.db")
    path.touch()
    with pytest.raises(RegistryError, match="there is no registry"):
        Registry.open(path)
    assert os.listdir(path.parent) == ["registry.db"]
    with pytest.raises(RegistryError, match="cannot read"):
        Registry.open(path.parent)


def test_a_reader_leaves_the_directory_as_it_was(path: Path) -> None:
    fill(path)
    before = (os.listdir(path.parent), path.read_bytes(), path.stat().st_mtime_ns)
    with Registry.open(path) as reader:
        reader.trials(), reader.verdicts(), reader.misses()
        assert os.listdir(path.parent) == ["registry.db"]
    assert (os.listdir(path.parent), path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_reader_imports_no_alembic(path: Path) -> None:
    fill(path)
    code = (
        "import sys; from tilebook.registry import Registry; Registry.open(sys.argv[1]).verdicts();"
        "sys.exit(sorted({'alembic', 'torch', 'triton', 'psycopg'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_a_registry_without_a_schema_number_is_refused_for_reading_and_mended_by_a_writer(path: Path) -> None:
    fill(path)
    execute(path, "PRAGMA user_version=0")
    with pytest.raises(RegistryError, match="not a tilebook registry"):
        Registry.open(path)
    Registry.open(path, write=True).close()
    with Registry.open(path) as reader:
        assert len(reader.trials()) == 20


def test_a_wal_registry_is_refused_for_reading_and_converted_by_a_writer(path: Path) -> None:
    fill(path)
    execute(path, "PRAGMA journal_mode=WAL")
    with pytest.raises(RegistryError, match="WAL"):
        Registry.open(path)
    assert os.listdir(path.parent) == ["registry.db"]
    Registry.open(path, write=True).close()
    with Registry.open(path) as reader:
        assert len(reader.trials()) == 20


def test_an_analyzed_registry_is_still_one(path: Path) -> None:
    fill(path)
    execute(path, "ANALYZE")
    with Registry.open(path) as reader:
        assert reader.verdicts() == [verdict()]


def test_a_locked_registry_is_one_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)
    monkeypatch.setattr("tilebook.registry.backend.WRITER_WAIT_S", 0.1)
    monkeypatch.setattr("tilebook.registry.backend.READER_WAIT_S", 0.1)
    registry = Registry.open(path, write=True)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert len(Registry.open(path).trials()) == 20, "readers do not wait for a writer that has not begun to commit"
    with pytest.raises(RegistryError, match="locked"):
        registry.record([trial(99)])
    other.execute("ROLLBACK")
    other.execute("BEGIN EXCLUSIVE")
    for write in (False, True):
        with pytest.raises(RegistryError, match="locked"):
            Registry.open(path, write=write)
    other.close()
    registry.record([trial(99)])


def test_writes_are_synchronous_and_the_schema_is_distrusted(path: Path) -> None:
    fill(path)
    connection = connect_sqlite(path, "rw")
    pragmas = ("synchronous", "foreign_keys", "trusted_schema", "cell_size_check", "mmap_size", "journal_mode")
    assert [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas] == [2, 1, 0, 1, 0, "delete"]
    connection.close()


@pytest.mark.long
def test_a_flipped_bit_never_changes_an_answer(path: Path) -> None:
    fill(path)
    good = path.read_bytes()
    known = {trial(number).sha256 for number in range(20)} | {verdict().sha256, revocation().sha256, miss().sha256}
    dice = random.Random(20261121)
    noticed = 0
    for _ in range(400):
        place, bit = dice.randrange(len(good)), dice.randrange(8)
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        path.write_bytes(bad)
        try:
            with Registry.open(path) as reader:
                found = [*reader.trials(), *reader.verdicts(), *reader.misses(), *reader.revocations()]
                noticed += bool(reader.problems)
        except RegistryError as error:
            noticed += "\n" not in str(error)
            continue
        digests = {record.sha256 for record in found}
        assert digests <= known, (place, bit)
        assert revocation().sha256 in digests or reader.problems, (place, bit)
    assert noticed > 30


def test_a_truncated_file_is_corrupt_not_a_crash(path: Path) -> None:
    fill(path)
    good = path.read_bytes()
    for size in (99, 100, 4096, len(good) // 2, len(good) - 4096):
        path.write_bytes(good[:size])
        with pytest.raises(RegistryError), Registry.open(path) as reader:
            reader.trials(), reader.verdicts(), reader.misses()
    path.write_bytes(good[:-1])  # SQLite reads the missing end of a page as zeros: one value changes
    with Registry.open(path) as reader:
        assert len(reader.trials()) == 20 - reader.corrupt == 19


def _lose_a_row(path: Path, table: str) -> None:
    """Lowers the count of rows in the last leaf page of a table: one is gone, and nothing points at the loss."""
    connection = sqlite3.connect(path)
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table]).fetchone()
    connection.close()
    content = bytearray(path.read_bytes())
    page = (root - 1) * size
    if content[page] == 5:  # an interior page ends with the number of its last child
        page = (int.from_bytes(content[page + 8 : page + 12], "big") - 1) * size
    content[page + 4] -= 1
    path.write_bytes(content)


@pytest.mark.parametrize("table", ["trial", "revocation"])
def test_rows_lost_with_a_page_are_noticed_by_readers_and_stop_writers(path: Path, table: str) -> None:
    fill(path)
    _lose_a_row(path, table)
    with Registry.open(path) as reader:
        left = reader.trials() if table == "trial" else reader.revocations()
        assert (len(left), reader.corrupt) == (19 if table == "trial" else 0, 0), "no row tells of the loss"
        assert [line for line in reader.problems if "rows may be missing" in line]
    damaged = path.read_bytes()
    with pytest.raises(RegistryError, match=r"corrupt.*export what is left"):
        Registry.open(path, write=True)
    assert path.read_bytes() == damaged


def test_a_reader_does_not_wait_for_the_check_of_a_huge_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path)
    _lose_a_row(path, "trial")
    monkeypatch.setattr("tilebook.registry.backend.READER_CHECKS_BYTES", 4096)
    with Registry.open(path) as reader:
        assert reader.problems == []


def _write_until_killed(path: Path, pipe: Connection, start: int) -> None:
    with Registry.open(path, write=True) as registry:
        for number in range(start, start + 1_000_000):
            registry.record([trial(number)])
            pipe.send(number)


def test_a_killed_writer_loses_no_committed_trial(path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    dice = random.Random(7)
    committed: set[int] = set()
    for life in range(20):
        ours, theirs = fork.Pipe(duplex=False)
        worker = fork.Process(target=_write_until_killed, args=(path, theirs, life * 1_000_000))
        worker.start()
        theirs.close()
        committed.add(ours.recv())
        time.sleep(dice.random() * 0.05)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        try:
            while True:
                committed.add(ours.recv())
        except EOFError:
            pass
    with Registry.open(path, write=True) as registry:
        kept = {found.sha256 for found in registry.trials()}
        assert registry.corrupt == 0
    assert {trial(number).sha256 for number in committed} <= kept
    assert len(kept) <= len(committed) + 20, "at most the one trial in flight at each death is there unannounced"


def die_in_mid_write(path: Path) -> None:
    worker = os.fork()
    if worker == 0:
        connection = connect_sqlite(path, "rw")
        connection.execute("PRAGMA cache_size=1")  # spills changed pages into the file before the commit
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE trial SET reason = hex(randomblob(2000))")
        connection.execute("UPDATE verdict SET trusted = 0")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(worker, 0)
    assert path.with_name("registry.db-journal").exists()


def test_after_a_death_in_mid_write_readers_read_a_recovered_copy_and_a_writer_mends_the_file(path: Path) -> None:
    fill(path)
    die_in_mid_write(path)
    left = path.read_bytes()
    with Registry.open(path) as reader:
        assert (len(reader.trials()), reader.corrupt) == (20, 0)
        assert (reader.verdicts(), reader.problems) == ([verdict()], [])
    served = serving.read(H200.name, H200.arch, H200.sm_count, str(path)).verdicts("rms_norm_fwd")[0]
    assert (served.layer, served.trusted) == ("explicit", True)
    assert path.read_bytes() == left, "a reader changes nothing"
    Registry.open(path, write=True).close()
    assert path.read_bytes() != left
    with Registry.open(path) as reader:
        assert len(reader.trials()) == 20


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A directory that another user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="tb-public-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_threads_of_one_process_create_registries_side_by_side(tmp_path: Path) -> None:
    def create(number: int) -> int:
        with Registry.open(tmp_path / f"{number}.db", write=True) as registry:
            return len(registry.verdicts())

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(create, range(24))) == [0] * 24


def test_a_shipped_registry_opens_from_a_read_only_directory(public_folder: Path, path: Path) -> None:
    with Registry.open(path, write=True) as registry:
        registry.record([trial(), trial(2, device=A100)], verdict())
        registry.record(verdict=predicted(problem=problem(7), trusted=False))
        registry.merge(revocations=[revocation(), revocation(config={}, origin="imported", trusted=False)])
        place = public_folder / "registry.db"
        assert ship(registry, place) == 1
    with Registry.open(place) as built:
        assert built.trials() == []
        assert built.verdicts() == [verdict(origin="shipped")]
        assert built.revocations() == [revocation(origin="shipped")]
    assert sorted(os.listdir(public_folder)) == ["registry.db", "shipped"]
    public_folder.chmod(0o555)
    reader, writer = os.pipe()
    other = os.fork()
    if other == 0:
        # Root may write anywhere, so the one who reads is somebody else.
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            outcome = f"{len(Registry.open(place).verdicts())} verdict; "
            Registry.open(place, write=True).record([trial()])
        except BaseException as error:
            outcome += f"{type(error).__name__}: {error}"
        os.write(writer, outcome.encode())
        os._exit(0)
    os.waitpid(other, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read().startswith("1 verdict; RegistryError: cannot open registry")
    public_folder.chmod(0o755)
    assert sorted(os.listdir(public_folder)) == ["registry.db", "shipped"]


def test_a_journal_that_is_gone_when_it_is_looked_at_hides_no_registry(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(path, write=True) as registry:
        registry.record([trial()])
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    assert sniff(path) is not None


def test_a_journal_that_is_gone_when_it_is_copied_is_tried_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Registry.open(path, write=True) as registry:
        registry.record([trial()])
    parts, calls = held.parts, []

    def read(source: Path) -> Iterator[bytes]:
        calls.append(source)
        if len(calls) == 1:
            raise FileNotFoundError(source)
        return parts(source)

    monkeypatch.setattr(held, "parts", read)
    folder = path.parent / "copies"
    folder.mkdir()
    assert sqlitefile._recovered(path, folder).read_bytes() == path.read_bytes()
    assert len(calls) == 2
