"""A process that reads a registry keeps the locks that it writes it with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from registry_samples import H200, fill, trial

from tilebook.registry import Registry, held, serving
from tilebook.registry.filereader import FileReader
from tilebook.registry.filewriter import FileWriter
from tilebook.registry.target import sniff


def another_gets_the_lock(path: Path) -> bool:
    code = (
        "import sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "try: database.execute('BEGIN IMMEDIATE')\n"
        "except sqlite3.OperationalError: sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code, str(path)], check=False)
    assert done.returncode in (0, 7)
    return done.returncode == 0


READINGS: dict[str, Callable[[Path], Any]] = {
    "a header": sniff,
    "dispatch": lambda path: serving.read(H200.name, H200.arch, H200.sm_count, str(path)).verdicts("rms_norm_fwd"),
    "a reader": lambda path: FileReader.open(path).__exit__(None, None, None),
    "a registry": lambda path: Registry.open(path).close(),
    "a copy": lambda path: list(held.parts(path)),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize(
    "opened", [lambda path: Registry.open(path, write=True), FileWriter.open], ids=["whole", "light"]
)
def test_who_reads_what_its_process_writes_lets_nobody_else_write(
    path: Path, opened: Callable[[Path], Any], read: Callable[[Path], Any]
) -> None:
    fill(path)
    with opened(path) as registry, registry.transaction():
        assert not another_gets_the_lock(path)
        read(path)
        assert not another_gets_the_lock(path)
    assert another_gets_the_lock(path)


def test_files_that_are_gone_and_too_many_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_held", {})
    monkeypatch.setattr(held, "MOST", 3)
    for number in range(10):
        (tmp_path / f"{number}").write_text(f"{number}")
        assert held.read(tmp_path / f"{number}", 9) == f"{number}".encode()
    assert len(held._held) == 3
    for number in range(10):
        (tmp_path / "draft").write_text(f"new {number}")
        (tmp_path / "draft").replace(tmp_path / "9")
        assert held.read(tmp_path / "9", 9) == f"new {number}".encode()
        assert list(held.parts(tmp_path / "9")) == [f"new {number}".encode()]
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        held.read(tmp_path / "9", 9)
    descriptors = list(held._held.values())
    assert len(descriptors) <= 3
    for each in descriptors:
        os.close(each)


def test_processes_whose_threads_read_what_they_write_leave_it_whole(path: Path) -> None:
    fill(path)
    code = (
        "import sys, threading\n"
        f"sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        "from registry_samples import H200, Path, Registry, trial\n"
        "from tilebook.registry import serving\n"
        "path, first, ended = sys.argv[1], int(sys.argv[2]), []\n"
        "def read():\n"
        "    while not ended: serving.read(H200.name, H200.arch, H200.sm_count, path).verdicts('rms_norm_fwd')\n"
        "thread = threading.Thread(target=read)\n"
        "thread.start()\n"
        "with Registry.open(path, write=True) as registry:\n"
        "    for number in range(12): registry.record([trial(first + 10 * number + each) for each in range(10)])\n"
        "ended.append(True)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n * 10_000)]) for n in (1, 2)]
    assert [each.wait(60) for each in writers] == [0, 0]
    with Registry.open(path) as registry:
        wanted = {trial(n * 10_000 + number).sha256 for n in (1, 2) for number in range(120)}
        assert wanted <= {each.sha256 for each in registry.trials()}
        assert registry.problems == []
