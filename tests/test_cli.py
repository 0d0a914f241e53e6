"""The command line as a subprocess, the way a user has it, without a GPU."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from tilebook.cli import main
from tilebook.registry import Registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine without a GPU")

TUNE = ["tune", "mlp", "--shape", "M64,H32,I64", "--direction", "fwd", "--gpu", "H200", "--trials", "3"]


@pytest.fixture
def run(tmp_path):
    """Runs `tilebook ARGS` with an empty home and a registry of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TILEBOOK_REGISTRY")}
    environment |= {"HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data"), "COLUMNS": "200"}
    environment["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", os.path.expanduser("~/.triton/cache"))

    def start(*arguments, wait=True, **more):
        command = [sys.executable, "-m", "tilebook.cli", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **more},
            start_new_session=True,
        )
        if not wait:
            return process
        process.out, process.err = process.communicate(timeout=240)
        return process

    start.registry = tmp_path / "registry.db"
    return start


def rows(process):
    assert process.returncode == 0, process.err
    return json.loads(process.out)


def test_tune_show_explain_export_import_from_end_to_end(run, tmp_path):
    there = ["--registry", run.registry]
    tuned = rows(run(*TUNE, *there, "--format", "json"))
    assert {row["op"] for row in tuned} == {"mlp_up_fwd", "mlp_down_fwd"}
    required = "op problem device implementation config status time_ms default_time_ms speedup speedup_low speedup_high"
    for row in tuned:
        assert set(required.split()) | {"layer", "stale"} <= set(row)
        assert (row["status"], row["time_ms"], row["speedup"]) == ("predicted", None, None)
        assert row["predicted_ms"] > 0
        assert row["tried"] == 3

    by_op = lambda found: sorted(found, key=lambda row: row["op"])  # noqa: E731
    mine = lambda found: [row for row in found if row["layer"] == "explicit"]  # noqa: E731
    shown = rows(run("show", *there, "--format", "json"))
    assert by_op(mine(shown)) == by_op(tuned)
    assert {row["layer"] for row in shown} == {"explicit", "shipped"}
    table = run("show", *there)
    assert "mlp_up_fwd" in table.out
    assert "nothing was measured" in table.out

    why = run("explain", "mlp_up_fwd", "--shape", "M64,H32,I64", "--gpu", "H200", *there)
    assert "explicit has a predicted verdict for exactly this problem" in why.out
    near = json.loads(
        run("explain", "mlp_up_fwd", "--shape", "M77,H32,I64", "--gpu", "H200", *there, "--format", "json").out
    )
    assert near["source"] == "nearest"

    exported = tmp_path / "out.jsonl"
    assert run("export", exported, *there).returncode == 0
    other = tmp_path / "other.db"
    imported = run("import", exported, "--registry", other)
    assert imported.returncode == 0, imported.err
    assert "2 verdicts imported" in imported.err
    assert [r["trusted"] for r in mine(rows(run("show", "--registry", other, "--format", "json")))] == [False, False]
    run("import", exported, "--registry", other, "--trust")
    assert [r["trusted"] for r in mine(rows(run("show", "--registry", other, "--format", "json")))] == [True, True]

    again = run(*TUNE, *there)
    assert "has a verdict already" in again.err


def test_killed_run_resumes_with_its_trials(run):
    command = ["tune", "mlp", "--shape", "M512,H256,I512", "--direction", "fwd", "--gpu", "H200", "--trials", "16"]
    process = run(*command, "--registry", run.registry, "--workers", "2", wait=False)
    deadline = time.monotonic() + 120
    stored = 0
    while stored < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
        if run.registry.exists():
            try:
                with Registry.open(run.registry) as registry:
                    stored = len(registry.trials())
            except Exception:
                continue
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with Registry.open(run.registry, write=True) as registry:
        kept = len(registry.trials())
    assert kept >= 3
    finished = run(*command, "--registry", run.registry)
    assert finished.returncode == 0, finished.err
    assert "from before" in finished.err
    with Registry.open(run.registry) as registry:
        assert len(registry.trials()) >= kept
        assert len(registry.verdicts()) == 2


def test_ctrl_c_ends_in_one_line_and_leaves_no_process(run):
    command = ["tune", "mlp", "--shape", "M4096,H64,I64", "--direction", "fwd", "--gpu", "H200"]
    process = run(*command, "--registry", run.registry, wait=False)
    deadline = time.monotonic() + 120
    while not run.registry.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("tilebook: interrupted")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["tune"], 2, "there is no GPU here"),
        (["tune", "--gpu", "GeForce 256"], 2, "not in the catalogue"),
        (["tune", "--gpu", "RTX"], 2, "ambiguous"),
        (["tune", "poetry", "--gpu", "H200"], 2, "no kernel family 'poetry'; there are attention"),
        (["tune", "--suite", "enormous", "--gpu", "H200"], 2, "no suite 'enormous'"),
        (["tune", "attention", "--shape", "B1,H2,S3", "--gpu", "H200"], 2, "lacks D"),
        (["tune", "attention", "--shape", "B1,H6,Hkv4,S3,D64", "--gpu", "H200"], 2, "not a multiple"),
        (["tune", "--shape", "B1,H2,S3,D64", "--gpu", "H200"], 2, "exactly one family"),
        (["tune", "attention", "--suite", "fa", "--shape", "B1,H2,S3,D64", "--gpu", "H200"], 2, "not both"),
        (["tune", "--gpu", "H200", "--search", "luck"], 2, "no search 'luck'"),
        (["tune", "--gpu", "H200", "--budget", "soon"], 2, "not a duration"),
        (["explain", "attention_fwd", "--shape", "B1,H2,S3,D64"], 2, "there is no GPU here"),
        (["explain", "attention_sideways", "--shape", "B1,H2,S3,D64"], 2, "no op"),
        (["show", "--op", "attention_sideways"], 2, "no op"),
        (["import", "nowhere.jsonl"], 2, "does not exist"),
        (["export", "out.jsonl"], 1, "registry"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_line_and_changes_nothing(tmp_path, monkeypatch, arguments, status, text):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TILEBOOK_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert text in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.strip()]) <= 4  # click adds its usage lines
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("arguments", [["tune", "--gpu", "GeForce 256"], ["tune", "--frobnicate"]])
def test_bad_usage_of_the_program_itself(run, arguments):
    process = run(*arguments)
    assert (process.returncode, process.out) == (2, "")
    assert "Traceback" not in process.err


FOREIGN = {
    "text": b"this is a letter, not a registry\n",
    "empty": b"",
    "truncated": b"SQLite format 3\0" + bytes(300),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("command", [["show"], ["export", "x.jsonl"], TUNE], ids=lambda c: c[0])
def test_foreign_registry_file_is_refused_and_left_alone(run, command, content):
    if not content and command is TUNE:
        pytest.skip("an empty file may be made a registry")
    run.registry.write_bytes(content)
    process = run(*command, "--registry", run.registry)
    assert process.returncode == 1
    assert len(process.err.strip().splitlines()) == 1, process.err
    assert run.registry.read_bytes() == content


def test_database_of_another_program_is_refused_and_left_alone(run):
    with sqlite3.connect(run.registry) as database:
        database.execute("create table recipes (name text)")
    before = run.registry.read_bytes()
    for command in (["show"], TUNE):
        process = run(*command, "--registry", run.registry)
        assert process.returncode == 1, process.err
        assert "Traceback" not in process.err
    assert run.registry.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n", b'{"format":"tilebook-registry"}\n', b"[" * 5000])
def test_malformed_import_is_refused_and_changes_nothing(run, tmp_path, content):
    hostile = tmp_path / "hostile.jsonl"
    hostile.write_bytes(content)
    process = run("import", hostile, "--registry", run.registry)
    assert process.returncode == 1
    assert len(process.err.strip().splitlines()) == 1, process.err
    if run.registry.exists():
        with Registry.open(run.registry) as registry:
            assert registry.verdicts() == registry.trials() == []


def test_help_is_quick_and_names_the_commands(run):
    start = time.monotonic()
    process = run("--help")
    assert process.returncode == 0
    assert time.monotonic() - start < 5
    assert all(name in process.out for name in ("tune", "show", "explain", "export", "import"))
