"""Processes that help with large exports and imports: how many there are, and that they end with whoever asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_samples import a_verdict, problem, signed

from tilebook.registry import workers

PROGRAM = """
import io, sys, time
from tilebook.registry import incoming, load, outgoing, workers
from tilebook.registry.filewriter import FileWriter
from pathlib import Path
incoming.ALONE, incoming._LINES, workers.count = 0, 4, lambda: 2
print("begun", flush=True)
slow = open(sys.argv[2])
class Slow(io.StringIO):
    def readline(self, *most):
        time.sleep(0.02)
        return super().readline(*most)
load(FileWriter.open(Path(sys.argv[1])), Slow(slow.read()), allowed=None)
print("done", flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program without a guard around its main part, in the middle of an import."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "file.jsonl").write_text(signed(*(a_verdict(problem=problem(rows)) for rows in range(100))))
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "new.db"), str(tmp_path / "file.jsonl")]
    found = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    yield found
    found.kill()
    found.communicate()


def helpers_of(number: int) -> list[int]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        if len(found) == 2:
            return list(map(int, found))
        time.sleep(0.01)
    raise AssertionError("no process helps")


def lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["interrupt", "kill", "nothing"])
def test_no_process_outlives_its_parent_nor_says_a_word(program: subprocess.Popen[str], how: str) -> None:
    helpers = helpers_of(program.pid)
    if how == "interrupt":
        os.killpg(program.pid, signal.SIGINT)
    elif how == "kill":
        program.kill()
    out, err = program.communicate(timeout=30)
    until = time.monotonic() + 10
    while any(map(lives, helpers)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(lives, helpers))
    assert out.count("begun") == 1
    assert ("done" in out) == (how == "nothing")
    assert err.count("Traceback") == (how == "interrupt")


def test_one_core_or_a_program_that_is_no_python_has_nobody_to_help_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(workers, "_quota", lambda: 64)
    assert workers.count() == workers.MOST
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/usr/bin/blender")
        assert workers.count() == 0
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
        assert workers.count() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert workers.count() == 0


@pytest.mark.parametrize(("told", "cores"), [("150000 100000", 2), ("max 100000", sys.maxsize), ("50000 100000", 1)])
def test_a_container_has_the_cores_whose_time_it_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(told + "\n")
    monkeypatch.setattr(workers, "_QUOTA", tmp_path / "cpu.max")
    assert workers._quota() == cores
