"""What programs asked for that no verdict covers: told by `status`, tuned by `tune --misses`."""

import dataclasses
import json

import pytest
from click.testing import CliRunner

from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.cli.tuning import _missed
from tilebook.registry import Device, Miss, Registry
from tilebook.report.asked import target


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A registry with what programs asked for on an H200: (op, shape, calls, ms a call), the heaviest not first."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TILEBOOK_REGISTRY", raising=False)
    gpu = devices.find("H200")
    counted = [
        ("mlp_up_fwd", "M64,H32,I64", 1000, 0.01),
        ("attention_fwd", "B2,H4,S300,D64,causal", 50_000, 0.02),
        ("attention_fwd", "B8,H6,S196,D64", 10, 0.01),  # the package has a verdict for it
        ("attention_fwd", "B2,H4,S300,D33", 7, 0.02),  # no kernel of ours runs it
        ("attention_bwd", "B2,H4,S300,D64,causal", 10_000, 0.05),
    ]
    path = tmp_path / "ledger.db"
    with Registry.open(path, write=True) as registry:
        registry.count_misses(
            Miss(op, ops.get(op).problem.parse(shape, "bf16").key, Device(*gpu.identity), calls, ms)
            for op, shape, calls, ms in counted
        )
    return path


def test_misses_are_tuned_heaviest_first_but_not_what_is_covered_or_nobody_can_tune(ledger):
    def labels(families=(), direction="both"):
        found = _missed(families, (), (), direction, "H200", str(ledger))
        return [f"{each.op.name} {each.problem.label}" for each in found]

    fwd, bwd, mlp = (
        "attention_fwd B2,H4,S300,D64,causal",
        "attention_bwd B2,H4,S300,D64,causal",
        "mlp_up_fwd M64,H32,I64",
    )
    assert labels() == [fwd, bwd, mlp]
    assert labels(["attention"], "fwd") == [fwd]
    assert labels(["mlp"]) == [mlp]


def test_status_says_what_was_asked_for_and_what_share_of_it_verdicts_cover(ledger):
    done = CliRunner().invoke(main, ["status", "--gpu", "H200", "--registry", str(ledger), "--format", "json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.output)
    assert data["layers"] == {"shipped": sum(data["verdicts"].values())}
    assert data["asked_s"] == pytest.approx(1.51, abs=0.01)
    assert data["covered"] == pytest.approx(0.0001 / data["asked_s"])
    assert [each["covered"] for each in data["asked"]] == [False, False, False, False, True]
    assert data["asked"][0]["share"] == pytest.approx(1.0 / data["asked_s"])
    text = CliRunner().invoke(main, ["status", "--gpu", "H200", "--registry", str(ledger)]).output
    assert "50,000 × 0.02 ms  attention_fwd B2,H4,S300,D64,causal bf16  (no verdict)" in text
    assert "attention_fwd B8,H6,S196,D64 bf16  (covered: " in text
    assert "tune --misses" in text


@pytest.mark.parametrize(("named", "found"), [("H100", "NVIDIA H100 80GB HBM3"), (None, "NVIDIA H100 80GB HBM3")])
def test_what_is_asked_of_the_gpu_here_goes_by_its_own_name(monkeypatch, named, found):
    gpu = dataclasses.replace(devices.find("H100"), name=found)
    monkeypatch.setattr(devices, "present", lambda: True)
    monkeypatch.setattr(devices, "current", lambda index=0: gpu)
    assert target(named) is gpu
    assert target("H200") is devices.find("H200")


def test_where_nothing_was_missed_there_is_nothing_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    done = CliRunner().invoke(main, ["tune", "--misses", "--gpu", "H200", "--format", "json"])
    assert (done.exit_code, done.stdout) == (0, "[]\n")
    assert "nothing to do" in done.stderr
    assert "no problem that had no verdict" in CliRunner().invoke(main, ["status", "--gpu", "H200"]).output
    assert not (tmp_path / "tilebook").exists()
