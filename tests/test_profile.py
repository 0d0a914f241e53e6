"""`tilebook profile` around programs: they run as without it, and what they call is told."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tilebook.profiling import notes, watching

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine without a GPU")

MODEL = """
import sys
import torch

from tilebook.profiling import notes, watching
import torch.nn.functional as F
import tilebook
from tilebook import dispatch


def train(steps):
    torch.manual_seed(0)
    weight, head = torch.ones(32, requires_grad=True), torch.randn(32, 50, requires_grad=True)
    optimizer = torch.optim.SGD([weight, head])
    with dispatch.use("torch"):  # calls on the CPU are dispatch's then
        while steps:
            steps -= 1
            x = tilebook.rms_norm(torch.randn(24, 32), weight).view(1, 2, 12, 32)
            x = tilebook.attention(x, x, x).reshape(24, 32)
            loss = F.cross_entropy(x @ head, torch.arange(24))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()
"""

OPS = {f"{name}_{way}" for name in ("rms_norm", "attention", "cross_entropy") for way in ("fwd", "bwd")}


@pytest.fixture
def start(tmp_path):
    """Starts `tilebook profile ARGS -- python -c TEXT`, or plainly the program alone."""

    def started(text, *arguments, plain=False):
        given = {name: value for name, value in os.environ.items() if not name.startswith("TILEBOOK")}
        before = [] if plain else [sys.executable, "-m", "tilebook", "profile", *arguments, "--"]
        return subprocess.Popen(
            [*before, sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            stdin=subprocess.DEVNULL, start_new_session=True,
            env={**given, "XDG_DATA_HOME": str(tmp_path), **({"TILEBOOK": "1"} if plain else {})},
        )  # fmt: skip

    return started


@pytest.fixture
def run(start):
    def ran(*arguments, **how):
        process = start(*arguments, **how)
        process.out, process.err = process.communicate(timeout=120)
        return process

    return ran


@pytest.mark.usefixtures("forked")
def test_a_program_computes_and_ends_as_ever_and_its_calls_are_told(run, tmp_path):
    text = f"{MODEL}\nprint(train(30))\nprint('done', file=sys.stderr)\nsys.exit(3)"
    found, expected = run(text, "--json", str(tmp_path / "found.json")), run(text, plain=True)
    assert (found.returncode, found.out) == (expected.returncode, expected.out)
    assert found.returncode == 3
    assert found.err.startswith("done\n")
    assert "in calls that dispatch sees" in found.err
    data = json.loads((tmp_path / "found.json").read_text())
    assert {each["op"] for each in data["problems"]} == OPS
    assert {each["calls"] for each in data["problems"]} == {data["steps"]}
    assert 5 < data["steps"] < 30
    assert 0 < data["dispatched"] < 1
    assert sum(each["share"] for each in data["problems"]) == pytest.approx(data["dispatched"])


@pytest.mark.long
def test_processes_that_are_forked_and_spawned_say_what_they_did_too(run, tmp_path):
    program = tmp_path / "several.py"
    program.write_text(
        f"{MODEL}\nimport multiprocessing, os\nif __name__ == '__main__':\n    train(40)\n"
        "    for how in ('fork', 'spawn'):\n"
        "        child = multiprocessing.get_context(how).Process(target=train, args=(3,))\n"
        "        child.start()\n        child.join()\n        assert child.exitcode == 0\n"
    )
    found = run(f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')", "--json", str(tmp_path / "o"))
    assert found.returncode == 0, found.err
    data = json.loads((tmp_path / "o").read_text())
    assert data["processes"] == 3
    assert data["steps"] < 50  # the parent's are not the forked child's
    assert "of 3 processes" in found.err


def test_a_program_that_never_loads_torch_is_told_apart(run):
    found = run("print('hello'); raise SystemExit(4)")
    assert (found.returncode, found.out) == (4, "hello\n")
    assert found.err == "tilebook: no process has imported torch beside tilebook\n"


def test_a_program_without_calls_is_told_so(run, tmp_path):
    found = run("import torch; raise SystemExit(5)", "--json", str(tmp_path / "o"), "--tune")
    assert (found.returncode, found.out) == (5, "")
    assert found.err == (
        "tilebook: the program called nothing on a GPU that tilebook has kernels for, and PyTorch sees no GPU here\n"
    )
    assert json.loads((tmp_path / "o").read_text()) == {}


def test_ctrl_c_is_the_programs(start):
    process = start(
        "import time\ntry:\n    print('on', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    exit(9)"
    )
    assert process.stdout.readline() == "on\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 9
    process = start("import time; print('on', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.long
def test_after_so_many_calls_a_program_is_ended_and_that_is_no_failure(run):
    begun = time.monotonic()
    found = run(f"{MODEL}\ntrain(-1)", "--calls", "300")
    assert found.returncode == 0, found.err
    assert "KeyboardInterrupt" in found.err
    assert "steps of" in found.err
    assert time.monotonic() - begun < 60


def test_a_folder_that_is_gone_does_not_break_import_torch(monkeypatch, recwarn):
    from tilebook import autoload

    monkeypatch.setenv("TILEBOOK_PROFILE", "/nowhere")
    monkeypatch.delenv("TILEBOOK", raising=False)
    autoload.load()
    assert "not profiled" in str(recwarn.list[-1].message)


@pytest.mark.long
def test_a_program_that_was_killed_is_not_said_to_have_made_no_call(run):
    found = run(f"{MODEL}\nimport os\ntrain(5)\nos._exit(6)")
    assert found.returncode == 6
    assert found.err == "tilebook: no call was noted: 1 of 1 processes were killed, or left by os._exit or exec\n"


def test_a_command_that_cannot_run_and_a_file_that_cannot_be_written_are_named_before_anything_runs(tmp_path):
    def told(*arguments):
        command = [sys.executable, "-m", "tilebook", "profile", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    (tmp_path / "plain").touch()
    for command, status, why in (
        (tmp_path / "plain", 126, "Permission denied"),
        ("nowhere", 127, "No such file or directory"),
    ):
        found = told("--", str(command))
        assert (found.returncode, found.stderr) == (status, f"tilebook: {command} cannot be run: {why}\n")
    found = told("--json", str(tmp_path / "none" / "o"), "--", sys.executable, "-c", "print('ran')")
    assert (found.returncode, found.stdout) == (2, "")
    assert "Invalid value for '--json'" in found.stderr


def test_calls_are_timed_until_there_are_times_enough_and_then_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "_WINDOW_S", 0.0)
    monkeypatch.setattr(watching, "_TICK_S", 1e-3)
    watched, turns = watching.Watching(tmp_path, None, None), []
    monkeypatch.setattr(watched.notes, "enough", lambda: len(turns) >= 5)
    monkeypatch.setattr(watched, "_turn", lambda to: (turns.append(to), len(turns) == 9 and watched._stop.set()))
    watched._run()
    assert turns == [True] * 5 + [False] * 4


def test_times_are_enough_once_each_problem_that_was_met_has_them():
    kept = notes.Notes(lambda: None)
    assert not kept.enough()
    kept._noted = {each: notes._Noted(None, timed=notes._ENOUGH, free=notes._FREE) for each in "ab"}
    kept._noted["b"].timed -= 1
    assert not kept.enough()
    kept._noted["b"].timed += 1
    assert kept.enough()


def test_once_calls_on_a_gpu_are_warm_they_are_timed_in_some_slices_of_time_alone(monkeypatch):
    kept, now = notes.Notes(lambda: None), [0]
    monkeypatch.setattr(notes.time, "perf_counter_ns", lambda: now[0] << notes._SLICE)
    assert kept.times()
    kept._spread, seen = True, []
    for now[0] in range(8):
        seen.append(kept.times())
    assert seen == [True, False, False, False] * 2


def test_calls_that_made_the_gpu_wait_are_not_enough_until_there_are_many():
    kept = notes.Notes(lambda: None)
    kept._noted = {"a": notes._Noted(None, timed=notes._PATIENCE - 1, free=notes._FREE - 1)}
    assert not kept.enough()
    kept._noted["a"].timed += 1
    assert kept.enough()


def test_why_pytorch_does_not_load_it_is_said(monkeypatch):
    from importlib import metadata

    from tilebook.cli import profile
    from tilebook.cli.common import unheard

    assert unheard() == ""
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert "install it with pip" in unheard()
    assert profile._nothing([]).endswith(unheard())
