"""Copies of a process that has PyTorch loaded are to those who start them what processes of their own are."""

import os
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="processes are copied on Linux, where no GPU is"
)

TELLS = """
import json, os, sys
own = sorted(int(each) for each in os.listdir("/proc/self/fd"))[:-1]  # the last is the folder's
print(json.dumps([sys.argv, os.getcwd(), os.environ["COLOUR"], os.getsid(0) == os.getpid(), os.getppid(), own]))
print(sys.stdin.read(), file=sys.stderr)
sys.exit(7)
"""
ENDS = {
    "raise SystemExit('no')": 1, "1 / 0": 1, "import os; os.abort()": -signal.SIGABRT,
    "import atexit, os; atexit.register(print, 'last'); print('first')": 0,
    "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)": -signal.SIGINT,
}  # fmt: skip


def both(program, *arguments, **options):
    """What a process of its own and a copy say of themselves."""
    for kind in (subprocess.Popen, forked.Popen):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with kind([sys.executable, "-c", program, *arguments], text=True, **pipes, **options) as process:
            out, err = process.communicate("hello", timeout=60)
        yield process.returncode, out, err


def test_it_has_what_it_is_given(tmp_path):
    env = {**os.environ, "COLOUR": "red"}
    own, copy = both(TELLS, "a", "b", cwd=tmp_path, env=env, start_new_session=True)
    assert copy == own
    assert own[0] == 7
    assert str(os.getpid()) in own[1]


@pytest.mark.parametrize("program", ENDS)
def test_it_ends_as_python_does(program):
    own, copy = both(program)
    assert copy[:2] == own[:2]
    assert own[0] == ENDS[program]
    assert copy[2].splitlines()[-1:] == own[2].splitlines()[-1:]


def test_it_has_pytorch_and_is_a_child_that_can_be_killed():
    began = time.monotonic()
    command = [sys.executable, "-c", "import sys; print('torch' in sys.modules, flush=True); sys.stdin.read()"]
    with forked.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        assert process.poll() is None
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("changes", [{"PYTHONHASHSEED": "1"}, {"OMP_NUM_THREADS": "3"}, {"LD_LIBRARY_PATH": "/none"}])
def test_what_must_be_known_before_pytorch_loads_begins_anew(changes):
    program = "import sys; print('torch' in sys.modules)"
    env = {**os.environ, **changes}
    with forked.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.communicate(timeout=60)[0] == "False\n"
