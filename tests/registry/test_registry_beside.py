"""What lies beside a registry's file, left by a writer that died or by a stranger: journals and logs of writes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_samples import Run
from registry_samples import H200, fill, miss, trial
from test_registry_sqlite import die_in_mid_write

from tilebook.registry import Registry, RegistryError, ledger, serving
from tilebook.registry.filereader import FileReader
from tilebook.registry.filewriter import FileWriter

MAGIC = bytes.fromhex("d9d505f920a163d7")
OPENED: dict[str, Callable[[Path], Any]] = {
    "read": Registry.open,
    "written": lambda path: Registry.open(path, write=True),
    "read lightly": FileReader.open,
    "written lightly": FileWriter.open,
    "counted": lambda path: ledger.add(path, [miss()], 0.1),
}


def journal_of_several(path: Path, other: Path) -> None:
    """A journal as of a transaction over several databases, which SQLite rolls back, and then deletes `other`."""
    content, name = path.read_bytes(), os.fsencode(other)
    (size,) = struct.unpack(">H", content[16:18])
    head = MAGIC + struct.pack(">5I", 0, 0, len(content) // size, 512, size)
    end = struct.pack(">I", (1 << 30) // size + 1) + name + struct.pack(">II", len(name), sum(name)) + MAGIC
    path.with_name(f"{path.name}-journal").write_bytes(head.ljust(512, b"\0") + end)


@pytest.mark.parametrize("opened", OPENED.values(), ids=OPENED)
def test_a_strangers_journal_has_no_file_deleted(path: Path, tmp_path: Path, opened: Callable[[Path], Any]) -> None:
    fill(path)
    (tmp_path / "precious").write_text("mine")
    journal_of_several(path, tmp_path / "precious")
    with pytest.raises(RegistryError, match=r"'registry\.db-journal' beside it is no registry's"):
        opened(path)
    table = serving.read(H200.name, H200.arch, H200.sm_count, str(path))
    assert [each for each in table.verdicts("rms_norm_fwd") if each.layer == "explicit"] == []
    assert "beside it" in "".join(table.problems)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_journal_made_up_beside_studies_has_no_file_deleted(run: Run, path: Path, tmp_path: Path) -> None:
    fill(path)
    run("export", tmp_path / "studies.db", "--as", "optuna", "--registry", path)
    (tmp_path / "precious").write_text("mine")
    journal_of_several(tmp_path / "studies.db", tmp_path / "precious")
    run("export", tmp_path / "studies.db", "--as", "optuna", "--registry", path, status=1)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture
def link(path: Path, tmp_path: Path) -> Path:
    """A link in another folder to a registry's file."""
    fill(path)
    (tmp_path / "link.db").symlink_to(path)
    return tmp_path / "link.db"


def test_through_a_link_what_a_dead_writer_left_is_read_as_beside_the_file(path: Path, link: Path) -> None:
    die_in_mid_write(path)
    for opened in (Registry.open, FileReader.open):
        with opened(link) as reader:
            assert (len(reader.trials()), reader.problems) == (20, [])
    table = serving.read(H200.name, H200.arch, H200.sm_count, str(link))
    assert table.verdicts("rms_norm_fwd")[0].layer == "explicit"
    with Registry.open(link, write=True) as registry:
        registry.record([trial(99)])
    with Registry.open(path) as registry:
        assert len(registry.trials()) == 21


@pytest.mark.parametrize("opened", OPENED.values(), ids=OPENED)
def test_through_a_link_no_pipe_is_waited_for(path: Path, link: Path, opened: Callable[[Path], Any]) -> None:
    os.mkfifo(path.with_name(f"{path.name}-journal"))
    with pytest.raises(RegistryError, match="is not a regular file"):
        opened(link)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 1000, None], ids=["empty", "nonsense", "a log"])
def test_beside_a_log_of_writes_readers_make_no_file_and_a_writer_takes_it_away(
    path: Path, tmp_path: Path, content: bytes | None
) -> None:
    fill(path)
    log = path.with_name(f"{path.name}-wal")
    if content is None:
        shutil.copy(path, tmp_path / "other.db")
        other = sqlite3.connect(tmp_path / "other.db", isolation_level=None)
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("UPDATE verdict SET notes = '{}'")
        content = (tmp_path / "other.db-wal").read_bytes()
        other.close()
    log.write_bytes(content)
    before = sorted(os.listdir(path.parent))
    for opened in (Registry.open, FileReader.open):
        with pytest.raises(RegistryError, match="WAL") if content else contextlib.nullcontext(), opened(path):
            pass
    serving.read(H200.name, H200.arch, H200.sm_count, str(path)).verdicts("rms_norm_fwd")
    assert sorted(os.listdir(path.parent)) == before
    with Registry.open(path, write=True) as registry:
        registry.record([trial(99)])
    assert not content or os.listdir(path.parent) == [path.name]
    with Registry.open(path) as registry:
        assert len(registry.trials()) == 21
