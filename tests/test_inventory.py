"""What commands that only read records know of the kernel families without loading them, and of the machine."""

import ast
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilebook
from tilebook import device as devices
from tilebook import inventory, machine, stated
from tilebook import op as ops

ROOT = Path(tilebook.__file__).parents[1]
NAMES = [name for name, op in ops.ops().items() if op.reference.__module__.startswith("tilebook.kernels.")]


def test_what_the_package_says_of_its_kernels_is_current():
    assert list(inventory.installed()) == NAMES
    assert inventory.read() == inventory.installed(), "run `make inventory`"


@pytest.mark.parametrize("name", NAMES)
def test_problems_read_from_keys_are_labelled_and_checked_as_the_family_does(name):
    op, entry = ops.get(name), inventory.read()[name]
    for problem in op.problem.examples():
        read = entry.problem.from_key(problem.key)
        assert (read.label, read.key, read.dtype) == (problem.label, problem.key, problem.dtype)
    for key in [*_variants(op.problem.examples()[0].key), "[]", "{}", '{"colour":1}']:
        if _normal(op.problem, key):
            assert _said(entry.problem, key) == _said(op.problem, key), key


def _variants(key):
    values = json.loads(key)
    for field in values:
        for other in (0, 1, 3, 17, 264, 1 << 20, "many", None, True):
            yield json.dumps({**values, field: other}, sort_keys=True, separators=(",", ":"))


def _normal(problem, key):
    """Is it a key as problems have them, or none at all?"""
    try:
        return problem.from_key(key).key == key
    except (TypeError, ValueError):
        return True


def _said(problem, key):
    try:
        problem.from_key(key).check()
    except (TypeError, ValueError) as error:
        return str(error) if isinstance(error, ops.UsageError) else "no problem"
    return "a problem"


def test_a_file_made_from_other_kernels_counts_for_nothing(tmp_path):
    text = json.loads(inventory.FILE.read_text())
    for name, content in {
        "other": json.dumps({**text, "made_from": "0" * 64}),
        "torn": json.dumps(text)[:1000],
        "list": "[]",
        "none": None,
    }.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        assert inventory.read(tmp_path / name) is None
    inventory.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == inventory.FILE.read_bytes()


def test_a_program_takes_no_digest_that_the_package_states(monkeypatch):
    def never(function):
        raise AssertionError("sources are read, in 100 ms")

    ours = [each for name in NAMES for each in ops.get(name).tunables if not each.external]
    assert len(ours) > 30
    taken = type(ours[0]).__dict__["digest"].func
    with monkeypatch.context() as patch:
        patch.setattr(ops, "digest", never)
        stated = [taken(each) for each in ours]
    monkeypatch.setattr(ops, "source", lambda op, implementation: None)  # as where somebody is at work on kernels
    assert stated == [taken(each) for each in ours]


def test_what_kernels_take_from_elsewhere_is_among_what_is_compared():
    """A constant counts by value; that of `launch` is about configs, which are no part of an entry."""
    for path in Path(tilebook.__file__).parent.joinpath("kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("tilebook."):
                continue
            taken = [getattr(importlib.import_module(node.module), each.name, None) for each in node.names]
            if any(isinstance(each, int | float | str) for each in taken):
                file = node.module.removeprefix("tilebook.").split(".")[0]
                assert file == "launch" or {file, f"{file}.py"} & set(stated._MADE_FROM), (path, node.module)


def test_another_function_in_an_implementations_place_has_its_own_digest():
    ours = ops.get("rms_norm_fwd").tunable
    other = ops.get("layer_norm_fwd").tunable.function
    assert dataclasses.replace(ours, function=other).digest != ours.digest


COMMANDS = """
import errno, json, os, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton", "numpy", "optuna", "alembic"):
            raise AssertionError(f"{name} is imported")

def read_only(event, details):
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    writes = event == "open" and isinstance(details[2], int) and details[2] & flags and details[0] != os.devnull
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.chmod", "os.utime", "os.truncate"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), details[0])

folder, commands, writable = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "writable"
sys.meta_path.insert(0, Refuse())
from click.testing import CliRunner
from tilebook.cli import main

if not writable:
    sys.addaudithook(read_only)
for command in commands:
    done = CliRunner().invoke(main, [each.replace("@", folder + "/") for each in command])
    if done.exit_code or (done.exception and not isinstance(done.exception, SystemExit)):
        sys.exit(f"{command}: {done.output} {done.exception!r}")
print("done")
"""

READING = [
    ["show"],
    ["show", "--op", "rms_norm_fwd", "--gpu", "h200", "--format", "json"],
    ["show", "--trials"],
    ["show", "--registry", "@new.db"],
    ["status", "--gpu", "H200"],
    ["status", "--gpu", "H200", "--registry", "@new.db"],
    ["export", "-"],
    ["export", "-", "--registry", "@new.db"],
    ["export", "-", "--registry", "@new.db", "--op", "rms_norm_fwd"],
    ["diff", "shipped", "@new.db"],
    ["diff", "@out.jsonl", "@new.db"],
    ["check"],
    ["check", "--registry", "@new.db"],
    ["remove", "--op", "rms_norm_fwd", "--registry", "@new.db", "--dry-run"],
    ["prune", "--registry", "@new.db", "--dry-run"],
    ["revoke", "--list"],
    ["keys", "show"],
]
MOVING = [
    ["export", "@out.jsonl"],
    ["import", "@out.jsonl", "--registry", "@new.db", "--trust"],
    ["merge", "@out.jsonl", "@new.db", "-o", "@all.db"],
    ["check", "--registry", "@all.db", "--repair"],
    ["repair", "--registry", "@all.db"],
    ["remove", "--op", "rms_norm_fwd", "--registry", "@all.db", "--yes"],
    ["prune", "--registry", "@all.db", "--yes"],
]


def run_all(commands, folder, kind="writable"):
    """Runs commands in a process that may not import PyTorch, nor write where it is of that kind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(folder)}
    environment.pop("TILEBOOK_REGISTRY", None)
    command = [sys.executable, "-c", COMMANDS, str(folder), json.dumps(commands), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_commands_that_move_records_do_not_load_pytorch(tmp_path):
    run_all(MOVING, tmp_path)


def test_commands_that_only_read_load_no_pytorch_and_work_where_nothing_can_be_written(tmp_path):
    run_all(MOVING[:2], tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    run_all(READING, tmp_path, "read only")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_told_without_pytorch_is_what_pytorch_tells(monkeypatch):
    told = devices.environment()
    monkeypatch.delitem(sys.modules, "torch")
    known = machine.environment()
    assert {"torch", "triton", "cuda"} <= known.keys()
    assert {name: version for name, version in known.items() if name not in ("driver", "cudnn")}.items() <= told.items()


def test_a_gpu_that_is_hidden_is_not_here(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_build", lambda: {"__version__": "2.11.0+cpu"})
    assert not machine.present(), "PyTorch for the CPU alone uses none"
    monkeypatch.setattr(machine, "_build", lambda: {"__version__": "2.11.0+cu130", "cuda": "13.0"})
    assert machine.present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not machine.present()
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not machine.present()


def test_the_gpu_here_goes_by_its_own_name_where_it_is_the_one_that_is_named(monkeypatch):
    here = ("NVIDIA H100 80GB HBM3", "sm_90", 132)
    monkeypatch.setattr(machine, "present", lambda: True)
    monkeypatch.setattr(machine, "_here", lambda: here)
    assert machine.target(None) == machine.target("H100") == here
    assert machine.target("H200") == devices.find("H200").identity
    monkeypatch.setattr(machine, "present", lambda: False)
    assert machine.target(None) is None
    assert machine.target("H100") == devices.find("H100").identity
