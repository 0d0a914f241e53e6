"""The program that runs PyTorch's own tests with tilebook and without says what fails with it alone."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "reliability" / "pytorchs_tests.py"

TESTS = """
import os
from pathlib import Path

import pytest

ON = os.environ["TILEBOOK"] == "1"


def test_passes():
    pass


def test_fails_either_way():
    assert not 1


@pytest.mark.skip
def test_is_skipped():
    pass


def test_fails_without():
    assert ON


def test_fails_with_it_alone():
    assert not ON, "these are\\nthe words"


def test_aborts_with_it_alone():
    if ON:
        os.abort()


@pytest.mark.parametrize("way", range(3))
def test_is_run_whatever_aborts(way):
    pass


def test_has_no_memory_at_first():
    place = Path(__file__).with_name(f"tried-{ON}")
    first = not place.exists()
    place.touch()
    assert not first, "OutOfMemoryError"
"""


def test_what_fails_with_tilebook_alone_is_told(tmp_path):
    file, report = tmp_path / "test_some.py", tmp_path / "report.json"
    file.write_text(TESTS)
    command = [sys.executable, str(PROGRAM), str(file), "--processes", "2", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    found = json.loads(report.read_text())["results"]
    assert done.returncode == 1, done.stderr
    assert (found["tests"], found["in_one_way_only"], found["again_for_want_of_memory"]) == (10, 0, 1)
    assert found["outcomes"] == {
        "passed, passed": 5, "passed, failed": 1, "passed, died": 1, "failed, failed": 1, "failed, passed": 1,
        "skipped, skipped": 1,
    }  # fmt: skip
    worse = found["worse_with_tilebook"]
    assert {each.partition("::")[2] for each in worse} == {"test_fails_with_it_alone", "test_aborts_with_it_alone"}
    assert "the words" in worse["test_some.py::test_fails_with_it_alone"][3]
    file.write_text("def test_passes():\n    pass\n")
    assert subprocess.run([*command, "--processes", "1"], capture_output=True, check=False, timeout=300).returncode == 0
