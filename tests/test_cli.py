"""The command line without a GPU: as a subprocess, the way a user has it, and in this process."""

import dataclasses
import functools
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
from test_cli_explained import EXPLAIN, MEASURED, SHAPE

from tilebook import op as ops
from tilebook.cli import main
from tilebook.cli.tuning import _problems
from tilebook.errors import RegistryError
from tilebook.registry import Registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine without a GPU")

TUNE = ["tune", "mlp", "--shape", "M64,H32,I64", "--direction", "fwd", "--gpu", "H200"]
TUNE += ["--trials", "3", "--workers", "1"]


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


def here(*command):
    """A command in this process: its status, and what it complains of."""

    def start(*more):
        done = CliRunner().invoke(main, [str(each) for each in (*command, *more)])
        return done.exit_code, done.stderr

    return start


def rows(process):
    assert process.returncode == 0, process.err
    return json.loads(process.out)


@pytest.mark.usefixtures("forked")
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
    assert "no measured verdict is for exactly this problem: PyTorch's own function" in why.out
    exported = tmp_path / "out.jsonl"
    assert run("export", exported, *there).returncode == 0
    other = tmp_path / "other.db"
    imported = run("import", exported, "--registry", other)
    assert imported.returncode == 0, imported.err
    assert "2 verdicts imported" in imported.err
    assert [r["trusted"] for r in mine(rows(run("show", "--registry", other, "--format", "json")))] == [False, False]
    run("import", exported, "--registry", other, "--trust")
    assert [r["trusted"] for r in mine(rows(run("show", "--registry", other, "--format", "json")))] == [True, True]

    assert "has a verdict already" in here(*TUNE)(*there)[1]
    near = ["explain", "mlp_up_fwd", "--shape", "M77,H32,I64", "--gpu", "H200", *there, "--format", "json"]
    why = json.loads(CliRunner().invoke(main, [*map(str, near)]).stdout)
    assert (why["source"], why["implementation"]) == ("fallback", "torch")


def _trials_without_verdict(target):
    """Trials of problems that have no verdict yet; none where the file cannot be read at this moment."""
    try:
        with Registry.open(target) as registry:
            decided = {(verdict.op, verdict.problem) for verdict in registry.verdicts()}
            return [trial for trial in registry.trials() if (trial.op, trial.problem) not in decided]
    except (RegistryError, OSError):
        return []


@pytest.mark.long
def test_killed_run_resumes_with_its_trials(run):
    command = ["tune", "mlp", "--shape", "M512,H256,I512", "--direction", "fwd", "--gpu", "H200", "--trials", "8"]
    process = run(*command, "--registry", run.registry, "--workers", "2", wait=False)
    deadline = time.monotonic() + 120
    # Stopped before it is looked at: between the look and the kill the run would go on to its verdict.
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        if run.registry.exists():
            os.killpg(process.pid, signal.SIGSTOP)
            if len(_trials_without_verdict(run.registry)) >= 3:
                break
            os.killpg(process.pid, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with Registry.open(run.registry, write=True) as registry:
        kept = len(registry.trials())
    assert kept >= 3
    finished = run(*command, "--registry", run.registry, "--workers", "1")
    assert finished.returncode == 0, finished.err
    assert "from before" in finished.err
    with Registry.open(run.registry) as registry:
        assert len(registry.trials()) >= kept
        assert len(registry.verdicts()) == 2


def test_ctrl_c_ends_in_one_line_and_leaves_no_process(run):
    command = ["tune", "mlp", "--shape", "M4096,H64,I64", "--direction", "fwd", "--gpu", "H200", "--workers", "1"]
    process = run(*command, "--registry", run.registry, wait=False)
    deadline = time.monotonic() + 120
    while not run.registry.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("tilebook: interrupted")
    assert "Traceback" not in err
    for op in ("mlp_up_fwd", "mlp_down_fwd"):
        assert f"not reached: {op} M4096,H64,I64 bf16: interrupted" in out


def test_suites_add_up():
    def problems(*suites):
        return _problems(["attention"], suites, [], "bf16", "fwd")

    both = problems("seeds", "fa")
    assert set(both) == {*problems("seeds"), *problems("fa")}
    assert len(both) == len(set(both)) < len(problems("seeds")) + len(problems("fa"))
    assert problems() == problems("quick")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["tune"], 2, "there is no GPU here"),
        (["tune", "--gpu", "GeForce 256"], 2, "not in the catalogue"),
        (["tune", "--gpu", "RTX"], 2, "ambiguous"),
        (["tune", "poetry", "--gpu", "H200"], 2, "no kernel family or op 'poetry'; the families are add_layer_norm"),
        (["tune", "--suite", "enormous", "--gpu", "H200"], 2, "no suite 'enormous'"),
        (["tune", "attention", "--shape", "B1,H2,S3", "--gpu", "H200"], 2, "lacks D"),
        (["tune", "attention", "--shape", "B1,H6,Hkv4,S3,D64", "--gpu", "H200"], 2, "not a multiple"),
        (["tune", "--shape", "B1,H2,S3,D64", "--gpu", "H200"], 2, "exactly one family"),
        (["tune", "attention", "--suite", "fa", "--shape", "B1,H2,S3,D64", "--gpu", "H200"], 2, "not both"),
        (["tune", "--gpu", "H200", "--search", "luck"], 2, "no search 'luck'"),
        (["tune", "--gpu", "H200", "--budget", "soon"], 2, "not a duration"),
        (["tune", "--misses"], 2, "there is no GPU here"),
        (["tune", "--misses", "--suite", "fa", "--gpu", "H200"], 2, "not two of them"),
        (["status"], 2, "there is no GPU here"),
        (["status", "--gpu", "GeForce 256"], 2, "not in the catalogue"),
        (["explain", "attention_fwd", "--shape", "B1,H2,S3,D64"], 2, "there is no GPU here"),
        (["tunes"], 2, "No such command 'tunes' (did you mean tune?)"),
        (["keys", "mak"], 2, "No such command 'mak' (did you mean make?)"),
        (["explain", "rms_norm", "--shape", "M8,N64"], 2, "(did you mean rms_norm_bwd or rms_norm_fwd?)"),
        (["explain", "attention_sideways", "--shape", "B1,H2,S3,D64"], 2, "no op"),
        (["show", "--op", "attention_sideways"], 2, "no op"),
        (["import", "nowhere.jsonl"], 2, "does not exist"),
        (["export", "out.jsonl", "--registry", "none.db"], 1, "there is no registry"),
        (["revoke"], 2, "needs an OP"),
        (["revoke", "--list", "--undo", "0123"], 2, "alone"),
        (["revoke", "--list", "--reason", "x"], 2, "alone"),
        (["revoke", "--undo", "everything"], 2, "not the id"),
        (["revoke", "--undo", "0123abcd"], 2, "no revocation 0123abcd"),
        (["revoke", "attention_fwd"], 2, "--reason"),
        (["revoke", "attention_fwd", "--reason", " "], 2, "--reason"),
        (["revoke", "attention_sideways", "--reason", "x"], 2, "no op"),
        (["revoke", "attention_fwd", "--reason", "x", "--implementation", "magic"], 2, "there are triton, "),
        (["revoke", "attention_fwd", "--reason", "x", "--implementation", "torch"], 2, "cannot be revoked"),
        (["revoke", "attention_fwd", "--reason", "x", "--config", "BLOCK_Q=64"], 2, "no axis 'BLOCK_Q', but BLOCK_M"),
        (["revoke", "attention_fwd", "--reason", "x", "--config", "BLOCK_M=65"], 2, "BLOCK_M is one of 64, 128"),
        (["revoke", "attention_fwd", "--reason", "x", "--config", "BLOCK_M=64,BLOCK_M=64"], 2, "stands twice"),
        (["revoke", "attention_fwd", "--reason", "x", "--arch", "hopper"], 2, "sm_90"),
        (["revoke", "attention_fwd", "--reason", "x", "--triton", "3.6"], 2, "not a range of versions"),
        (["revoke", "attention_fwd", "--reason", "x", "--triton", ">4,<3"], 2, "no version is in"),
        (["revoke", "attention_fwd", "--reason", "x", "--kernel", "mine"], 2, "64 hex digits"),
        (["revoke", "attention_fwd", "--reason", "x", "--implementation", "cudnn", "--triton", "<4"], 2, "not ours"),
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


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("arguments", [["tune", "--gpu", "GeForce 256"], ["tune", "--frobnicate"]])
def test_bad_usage_of_the_program_itself(run, arguments):
    process = run(*arguments)
    assert (process.returncode, process.out) == (2, "")
    assert "Traceback" not in process.err


def test_a_kernel_family_that_cannot_be_imported_is_one_line_and_the_others_are_served(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(ops, "_OPS", dict(ops._OPS))
    monkeypatch.setattr(ops, "_load_families", functools.cache(ops._load_families.__wrapped__))
    monkeypatch.setitem(sys.modules, "tilebook.kernels.decode", None)
    result = CliRunner().invoke(main, ["show", "--op", "rms_norm_fwd"])
    assert result.exit_code == 0, result.stderr
    (said,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert said.startswith("tilebook: kernel family decode cannot be imported: ModuleNotFoundError")


@pytest.mark.parametrize("family", ["decode", "norms"])
def test_of_a_kernel_family_that_cannot_be_imported_no_op_stays(monkeypatch, family):
    known = dict(ops.ops())
    monkeypatch.setattr(ops, "_OPS", known)
    monkeypatch.setattr(ops, "_load_families", functools.cache(ops._load_families.__wrapped__))
    monkeypatch.setitem(sys.modules, f"tilebook.kernels.{family}", None)
    with pytest.warns(RuntimeWarning, match=f"kernel family {family} cannot be imported"):
        left = set(ops.ops())
    gone = {
        "decode": {"attention_decode"},
        "norms": {f"{n}_norm_{d}" for n in ("rms", "layer") for d in ("fwd", "bwd")},
    }
    assert not gone[family] & left
    assert {"attention_fwd", "mlp_up_fwd"} <= left


FOREIGN = {
    "text": b"this is a letter, not a registry\n",
    "empty": b"",
    "truncated": b"SQLite format 3\0" + bytes(300),
}


def refused(where, run):
    """What is said of a registry that is none; it stays as it is."""
    before = where.read_bytes()
    code, said = run("--registry", where)
    assert code == 1, said
    assert len(said.strip().splitlines()) == 1, said
    assert where.read_bytes() == before


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("command", [["show"], ["export", "x.jsonl"], TUNE], ids=lambda c: c[0])
def test_foreign_registry_file_is_refused_and_left_alone(tmp_path, command, content):
    if not content and command is TUNE:
        pytest.skip("an empty file may be made a registry")
    (tmp_path / "registry.db").write_bytes(content)
    refused(tmp_path / "registry.db", here(*command))


@pytest.mark.usefixtures("forked")
def test_a_foreign_registry_file_is_refused_by_the_program(run):
    run.registry.write_bytes(FOREIGN["text"])
    for command in (["show"], TUNE):
        process = run(*command, "--registry", run.registry)
        assert (process.returncode, len(process.err.strip().splitlines())) == (1, 1), process.err
    assert run.registry.read_bytes() == FOREIGN["text"]


@pytest.mark.parametrize("command", [["show"], TUNE], ids=lambda c: c[0])
def test_database_of_another_program_is_refused_and_left_alone(tmp_path, command):
    with sqlite3.connect(tmp_path / "registry.db") as database:
        database.execute("create table recipes (name text)")
    refused(tmp_path / "registry.db", here(*command))


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n", b'{"format":"tilebook-registry"}\n', b"[" * 5000])
def test_malformed_import_is_refused_and_changes_nothing(tmp_path, content):
    hostile, target = tmp_path / "hostile.jsonl", tmp_path / "registry.db"
    hostile.write_bytes(content)
    code, said = here("import", hostile)("--registry", target)
    assert code == 1
    assert len(said.strip().splitlines()) == 1, said
    if target.exists():
        with Registry.open(target) as registry:
            assert registry.verdicts() == registry.trials() == []


def test_help_is_quick_and_names_the_commands(run):
    start = time.monotonic()
    process = run("--help")
    assert process.returncode == 0
    assert time.monotonic() - start < 5
    assert all(name in process.out for name in ("tune", "show", "explain", "export", "import", "revoke"))


@pytest.mark.long
def test_a_terminal_without_unicode_gets_plain_text(run):
    with Registry.open(run.registry, write=True) as registry:
        registry.record(verdict=dataclasses.replace(MEASURED, notes={"tried": 7, "seconds": {"total": 3.0}}))
    for command in (["show"], ["explain", *EXPLAIN[1:]], ["status", "--gpu", "H200"], ["revoke", "--list"]):
        process = run(*command, "--registry", run.registry, PYTHONIOENCODING="ascii")
        assert process.returncode == 0, process.err
        assert process.out.isascii()
        assert "?" not in process.out
    (told,) = run("explain", "nö", "--shape", "…", PYTHONIOENCODING="ascii").err.splitlines()
    assert "no op 'n?'" in told


@pytest.mark.long
def test_a_run_s_table_and_messages_are_plain_text_where_unicode_cannot_be_printed(run):
    command = ["tune", "mlp", "--shape", "M64,H32,I64", "--direction", "fwd", "--gpu", "H200", "--budget", "1s"]
    process = run(*command, "--workers", "1", "--registry", run.registry, PYTHONIOENCODING="ascii")
    assert process.returncode in (0, 1), process.err  # 1 where a slow machine reaches nothing
    assert (process.out + process.err).isascii()


UNUSABLE = "/proc/nope"


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nothing can be made")
def test_a_compile_cache_that_cannot_be_written_is_one_line(run):
    process = run(*TUNE, "--registry", run.registry, TRITON_CACHE_DIR=UNUSABLE)
    assert process.returncode == 1
    (said,) = process.err.strip().splitlines()
    assert said.startswith(f"tilebook: Triton's cache {UNUSABLE} cannot be written")
    assert "TRITON_CACHE_DIR" in said
    assert not run.registry.exists()


def test_the_package_is_a_program(run):
    done = subprocess.run([sys.executable, "-m", "tilebook", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: tilebook " in done.stdout
    assert "tune" in done.stdout


def test_fp32_problems_can_be_tuned_and_tf32_is_theirs_alone():
    attention = ops.get("attention_fwd").problem
    assert [problem.dtype for _, problem in _problems(["attention"], [], [SHAPE], "fp32", "fwd")] == ["fp32"]
    assert attention.parse(f"{SHAPE},tf32", "fp32").tf32
    with pytest.raises(ops.UsageError, match="tf32"):
        attention.parse(f"{SHAPE},tf32", "bf16")
    result = CliRunner().invoke(main, ["tune", "attention", "--shape", f"{SHAPE},tf32", "--gpu", "H200"])
    assert (result.exit_code, "tf32" in result.stderr) == (2, True)


def test_a_shape_is_tuned_as_the_bucket_that_a_call_with_it_asks_for(capsys):
    shapes = ["M4099,N5120", "M5000,N5120", "M8192,N1024"]
    found = _problems(["rms_norm"], [], shapes, "bf16", "fwd")
    assert [problem.label for _, problem in found] == ["M8192,N5120", "M8192,N1024"]
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"tilebook: rms_norm_fwd {shape}: calls of this shape ask for M8192,N5120, which is tuned"
        for shape in shapes[:2]
    ]
    ((op, problem),) = _problems(["decode"], [], ["B2,H8,Hkv2,S1,Sk3001,D128"], "bf16", "fwd")
    assert problem == op.problem.of(*op.problem.parse("B2,H8,Hkv2,S1,Sk3001,D128", "bf16").inputs("cpu", 0))
    assert "Sk4096" in problem.label


def test_what_suites_tune_is_what_calls_ask_for():
    for name, members in ops.suites(ops.ops().values()).items():
        for _, problem in members:
            assert problem.bucket() == problem, (name, problem.label)
