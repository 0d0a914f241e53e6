"""`tilebook record` says at its end what was recorded and what comes next, and refuses a bad file of spaces at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tilebook.cli import main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def record(tmp_path):
    paths = os.pathsep.join(map(str, (ROOT, HERE, ROOT / "tests", ROOT / "tests" / "tuner")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, "XDG_DATA_HOME": str(tmp_path)}

    def start(*arguments, wait=True):
        command = [sys.executable, "-m", "tilebook", "record", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        if wait:
            process.out, process.err = process.communicate(timeout=120)
        return process

    return start


def test_a_program_s_end_is_followed_by_what_was_recorded_where_and_what_comes_next(record, tmp_path):
    done = record("--to", tmp_path / "records", "--", sys.executable, HERE / "program.py")
    assert (done.returncode, done.out.splitlines()) == (0, ["100 16 3", "70 16 6"])
    (said,) = done.err.splitlines()
    place = tmp_path / "records"
    told = f"tilebook: 1 kernel and 2 problems recorded in {place}: `tilebook tune --recorded {place}` tunes them"
    assert said == told


def test_a_program_that_called_no_kernel_is_told_so_and_keeps_its_status(record):
    done = record("--", sys.executable, "-c", "import sys; print('ran'); sys.exit(3)")
    assert (done.returncode, done.out) == (3, "ran\n")
    (said,) = done.err.splitlines()
    assert said.startswith("tilebook: no kernel was recorded: the program called none that has an autotuner or a space")


def test_after_ctrl_c_it_is_said_too(record, tmp_path):
    program = "import time, sys; print('ran', flush=True); time.sleep(60)"
    process = record("--", sys.executable, "-c", program, wait=False)
    assert process.stdout.readline() == "ran\n"
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (1, 130)
    assert err.splitlines()[-1].startswith("tilebook: no kernel was recorded")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "has no spaces: "),
        ("[]", "has no spaces: "),
        ('{"plain:k": {"key": ["n"]}}', "each kernel has a space"),
        ('{"loopn": {"space": {"BLOCK": [1]}}}', "'loopn' is not package.module:kernel"),
        ('{"plain:k": {"space": {"BLOCK": 64}}}', "has not a list of values"),
    ],
)
def test_a_bad_file_of_spaces_is_refused_before_the_program_starts(tmp_path, content, why):
    spaces, ran = tmp_path / "spaces.json", tmp_path / "ran"
    spaces.write_text(content)
    done = CliRunner().invoke(main, ["record", "--spaces", str(spaces), "--", "touch", str(ran)])
    assert (done.exit_code, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert why in said
    assert not ran.exists()


def test_a_program_that_cannot_be_run_is_one_line():
    done = CliRunner().invoke(main, ["record", "--", "no-such-program"])
    assert done.exit_code == 127
    assert done.stderr.splitlines() == ["tilebook: no-such-program cannot be run: No such file or directory"]
