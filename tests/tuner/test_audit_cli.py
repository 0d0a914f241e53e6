"""`tilebook verify` and `tilebook audit` as a user has them, on the GPU that a sweep was recorded on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.op import Config
from tilebook.registry import (
    Device,
    Environment,
    Failure,
    Finalist,
    Registry,
    Speedup,
    Verdict,
    VerdictStatus,
)
from tilebook.tuner.process.runner import Attempt
from tilebook.tuner.sweeps.machines import Machines
from tilebook.tuner.sweeps.recorded import default
from tilebook.tuner.sweeps.sweep import read

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine without a GPU")

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks/results/nvidia-h200/sweeps/attention_fwd-B4-H16-S2048-D64-bf16.jsonl"
SWEEP = read(RECORDED)
OP = ops.get("attention_fwd")
EXPLAIN = ("explain", OP.name, "--shape", SWEEP.header["label"], "--gpu", "H200")


def fastest():
    passed = [each for each in SWEEP.ours if each.attempt.failure is None]
    first = default(SWEEP)
    return min((e for e in passed if e.candidate.config != first), key=lambda each: each.attempt.time_ms).candidate


WINNER = fastest()


def stale(**changes):
    """The sweep's problem, won by the fastest of our kernel's other configs than the default, under an older Triton."""
    times = {each.candidate: each.attempt.time_ms for each in SWEEP.measured}
    default_ms = next(ms for c, ms in times.items() if c.config == default(SWEEP) and c.implementation == "triton")
    winner = Finalist("triton", dict(WINNER.config), time_ms=times[WINNER])
    torch_ms = next(ms for c, ms in times.items() if c.implementation == "torch")
    made = Verdict(
        op=OP.name,
        problem=SWEEP.header["problem"],
        device=Device(*SWEEP.device.identity),
        environment=Environment({**SWEEP.header["environment"], "triton": "3.5.0"}),
        kernel=OP.digest,
        status=VerdictStatus.MEASURED,
        finalists=(
            winner,
            Finalist("triton", dict(default(SWEEP)), time_ms=default_ms, default=True),
            Finalist("torch", {}, time_ms=torch_ms),
        ),
        default_time_ms=default_ms,
        interval=Speedup(1.2, 1.1, 1.3),
    )
    return dataclasses.replace(made, **changes)


UNTRUSTED = {"origin": "imported", "trusted": False}


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs `tilebook ARGS` on a registry of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(tmp_path / "registry.db"))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "shipped.db")
    monkeypatch.setattr(devices, "package_version", lambda package: SWEEP.header["environment"].get(package, "1.0"))

    def start(*arguments, status=0):
        start.result = result = CliRunner().invoke(main, [str(each) for each in arguments])
        assert result.exit_code == status, result.stderr or result.exception
        return result.stdout if status == 0 else result.stderr

    def holds(*verdicts):
        with Registry.open(tmp_path / "registry.db", write=True) as registry:
            registry.merge(verdicts=verdicts)

    def verdict():
        with Registry.open(tmp_path / "registry.db") as registry:
            return registry.verdicts()[0]

    start.holds, start.verdict = holds, verdict
    return start


@pytest.fixture
def broken(tmp_path):
    """The sweep as it would be if the winner's answer were wrong."""
    failed = Attempt(Failure.WRONG_ANSWER, "output 0: max error 3.2 (allowed 0.01)")
    path = tmp_path / "broken.jsonl"
    lines = RECORDED.read_text(encoding="utf-8").splitlines(keepends=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.write(lines[0])
        for each in SWEEP.measured:
            each = dataclasses.replace(each, attempt=failed) if each.candidate == WINNER else each
            stream.write(json.dumps(each.to_json()) + "\n")
    return path


@pytest.mark.parametrize("command", ["verify", "audit"])
def test_without_a_gpu_it_says_so_in_one_line(cli, command):
    said = cli(command, status=2)
    assert said == "tilebook: there is no GPU here: verdicts are looked at on the GPU that they are for\n"


@pytest.mark.parametrize("command", ["verify", "audit"])
def test_help_ends_with_an_example(cli, command):
    last = cli(command, "--help").rstrip().rsplit("\n\n", 1)[-1]
    assert last.split()[0] == "Example:"
    assert f"tilebook {command}" in last


def test_a_recorded_gpu_has_no_number(cli):
    assert "not both" in cli("audit", "--gpu", 0, "--recorded", RECORDED, status=2)


def test_what_verify_passes_is_trusted_and_the_table_says_what_was_done(cli):
    cli.holds(stale(**UNTRUSTED))
    assert json.loads(cli(*EXPLAIN, "--format", "json"))["source"] == "fallback"
    table = cli("verify", "--recorded", RECORDED)
    assert "1 verdicts: 1 kept, 0 demoted, 0 quarantined, 0 not checked, 0 not reached" in table
    assert "untrusted, triton 3.5.0 → 3.6.0" in table
    assert "× torch" in table
    assert "[1/1] attention_fwd B4,H16,S2048,D64 bf16: kept" in cli.result.stderr
    after = cli.verdict()
    assert (after.trusted, Config(after.config)) == (True, WINNER.config)
    assert after.environment.versions["triton"] == "3.6.0"
    why = json.loads(cli(*EXPLAIN, "--format", "json"))
    assert (why["source"], why["config"]) == ("exact", dict(WINNER.config))
    assert "nothing to look at" in cli("verify", "--recorded", RECORDED)


@pytest.mark.parametrize("command", ["verify", "audit"])
def test_the_reason_of_what_is_quarantined_is_shown_explained_and_listed(cli, broken, command):
    cli.holds(stale())
    found = json.loads(cli(command, "--recorded", broken, "--format", "json"))
    (row,) = found["verdicts"]
    assert found["counts"]["quarantined"] == 1
    assert (row["outcome"], row["served"]) == ("quarantined", None)
    assert row["reason"] == "wrong answer: output 0: max error 3.2 (allowed 0.01)"
    (shown,) = json.loads(cli("show", "--format", "json"))
    assert row["reason"] in shown["revoked"]
    assert f"({command}, B4,H16,S2048,D64 bf16)" in shown["revoked"]
    why = json.loads(cli(*EXPLAIN, "--format", "json"))
    assert (why["implementation"], why["config"]) != ("triton", dict(WINNER.config))
    assert row["reason"] in cli(*EXPLAIN)
    assert row["reason"] in cli("revoke", "--list")


def test_an_import_that_is_wrong_is_never_served(cli, broken):
    cli.holds(stale(**UNTRUSTED))
    cli("verify", "--recorded", broken)
    (shown,) = json.loads(cli("show", "--format", "json"))
    assert (shown["trusted"], bool(shown["revoked"])) == (False, True)
    why = json.loads(cli(*EXPLAIN, "--format", "json"))
    assert (why["source"], why["config"]) == ("fallback", {})


def test_a_dry_run_says_what_would_be_looked_at_and_writes_nothing(cli, tmp_path):
    cli.holds(stale())
    before = (tmp_path / "registry.db").read_bytes()
    told = cli("audit", "--recorded", RECORDED, "--dry-run")
    assert told.startswith("attention_fwd B4,H16,S2048,D64 bf16: triton ")
    assert "1 verdicts for NVIDIA H200 would be looked at" in cli.result.stderr
    (row,) = json.loads(cli("verify", "--recorded", RECORDED, "--dry-run", "--format", "json"))
    assert row["because"] == ["triton 3.5.0 → 3.6.0"]
    assert (tmp_path / "registry.db").read_bytes() == before


def test_only_the_op_that_is_named_is_looked_at(cli):
    cli.holds(stale())
    assert "nothing to look at" in cli("audit", "--op", "rms_norm_fwd", "--recorded", RECORDED)
    assert "no op" in cli("audit", "--op", "no_such_op", "--recorded", RECORDED, status=2)


def test_what_would_not_be_served_whatever_is_found_is_counted(cli):
    cli.holds(stale(kernel="0" * 64, **UNTRUSTED))
    table = cli("verify", "--recorded", RECORDED)
    assert "nothing to look at" in table
    assert "1 more cannot serve here: revoked, of source as it was, not recorded, or not able to run" in table


def test_what_cannot_be_looked_at_is_said_and_is_exit_status_1(cli):
    other = OP.problem.parse("B2,H16,S2048,D64", "bf16")
    cli.holds(stale(problem=other.key), stale())
    cli("audit", "--recorded", RECORDED, status=1)
    table = cli.result.stdout
    assert "1 kept" in table
    assert "not checked: no sweep of attention_fwd B2,H16,S2048,D64 was recorded" in table


def test_ctrl_c_ends_in_one_line_keeps_what_is_done_and_says_what_is_left(cli, monkeypatch):
    cli.holds(stale(), stale(problem=OP.problem.parse("B2,H16,S2048,D64", "bf16").key))
    real = Machines.prepare

    def prepare(machines, op, problem):
        if problem.label != SWEEP.header["label"]:
            raise KeyboardInterrupt
        real(machines, op, problem)

    monkeypatch.setattr(Machines, "prepare", prepare)
    cli("verify", "--recorded", RECORDED, status=130)
    assert "1 kept, 0 demoted, 0 quarantined, 0 not checked, 1 not reached" in cli.result.stdout
    assert "not reached: attention_fwd B2,H16,S2048,D64 bf16: interrupted" in cli.result.stdout
    last = cli.result.stderr.splitlines()[-1]
    assert last == "tilebook: interrupted; what was done is kept, and the same command goes on from there"
    left = json.loads(cli("verify", "--recorded", RECORDED, "--dry-run", "--format", "json"))
    assert [row["problem"] for row in left] == ["B2,H16,S2048,D64 bf16"]
