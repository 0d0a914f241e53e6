"""`tilebook explain` and `revoke` in this process, on a registry with one measured verdict."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from flat_verdict import flat_verdict

from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.op import Config, Space
from tilebook.registry import Device, Environment, Finalist, Registry, Revocation, Speedup, VerdictStatus

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens on a machine without a GPU")


ATTENTION, H200 = ops.get("attention_fwd"), devices.find("H200")
SHAPE = "B4,H16,S2048,D64,causal,window128x0"
WINNER = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "HEADS": 1, "DESCRIPTORS": 0}
MEASURED = flat_verdict(
    op=ATTENTION.name,
    problem=ATTENTION.problem.parse(SHAPE, "bf16").key,
    device=Device(*H200.identity),
    environment=Environment({"triton": "3.6.0"}),
    kernel=ATTENTION.digest,
    status=VerdictStatus.MEASURED,
    implementation="triton",
    config=WINNER,
    time_ms=1.0,
    default_time_ms=2.0,
    speedup=2.0,
    speedup_low=1.9,
    speedup_high=2.1,
)
EXPLAIN = ("explain", ATTENTION.name, "--shape", SHAPE, "--gpu", "H200")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs `tilebook ARGS` in this process on a registry with one measured verdict; returns what it prints."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(tmp_path / "registry.db"))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "shipped.db")
    with Registry.open(tmp_path / "registry.db", write=True) as registry:
        registry.record(verdict=MEASURED)

    def start(*arguments, status=0):
        yes = ["--yes"] if arguments[0] == "revoke" and "--reason" in arguments else []
        result = CliRunner().invoke(main, [*(str(each) for each in arguments), *yes])
        assert result.exit_code == status, result.stderr
        return result.stdout if status == 0 else result.stderr

    return start


def test_revoke_show_explain_list_and_undo_from_end_to_end(cli):
    assert json.loads(cli("show", "--format", "json"))[0]["revoked"] is None
    assert json.loads(cli(*EXPLAIN, "--format", "json"))["config"] == WINNER
    said = cli(
        "revoke", ATTENTION.name, "--config", "num_warps=8, BLOCK_M=128", "--arch", "sm_90", "--reason", "a race"
    )
    assert "winner of 1 verdicts" in said
    assert f"{SHAPE} bf16 on NVIDIA H200 (layer explicit)" in said

    assert json.loads(cli("show", "--format", "json"))[0]["revoked"] == "a race"
    assert "measured, explicit, revoked: 'a race'" in " ".join(cli("show", "--all").split())
    why = json.loads(cli(*EXPLAIN, "--format", "json"))
    assert (why["source"], why["revoked"][0]["config"], why["revoked"][0]["reason"]) == ("default", WINNER, "a race")
    text = cli(*EXPLAIN)
    assert "revoked  triton BLOCK_M=128 " in text
    assert "num_warps=8: a race" in " ".join(text.split())
    assert "no verdict that is near can serve: the space's default config" in text

    (listed,) = json.loads(cli("revoke", "--list", "--format", "json"))
    assert (listed["config"], listed["kernel"]) == ({"BLOCK_M": 128, "num_warps": 8}, ATTENTION.digest)
    assert (listed["arch"], listed["triton"], listed["layer"], listed["trusted"]) == ("sm_90", None, "explicit", True)
    assert "BLOCK_M=128 num_warps=8 (sm_90, source" in cli("revoke", "--list")
    assert "the first reason stays" in cli(
        "revoke", ATTENTION.name, "--config", "num_warps=8,BLOCK_M=128", "--arch", "sm_90", "--reason", "again"
    )
    cli("revoke", "--undo", listed["id"][:8])
    assert cli("revoke", "--list") == "no revocations\n"
    assert json.loads(cli(*EXPLAIN, "--format", "json"))["config"] == WINNER


def test_a_revoked_default_is_explained(cli):
    cli("revoke", ATTENTION.name, "--reason", "the kernel is wrong")
    text = cli(*EXPLAIN)
    assert "runs     torch" in text
    assert text.count("the kernel is wrong") == 2, "the winner and the default"
    assert "the default config is revoked: PyTorch's implementation" in text


def test_an_imported_revocation_is_not_honoured_without_trust(cli, tmp_path):
    cli("revoke", ATTENTION.name, "--triton", ">=3.6", "--reason", "a race")
    cli("export", tmp_path / "out.jsonl")
    there = ("--registry", tmp_path / "other.db")
    cli("import", tmp_path / "out.jsonl", *there)
    assert "not honoured" in cli("revoke", "--list", *there)
    assert json.loads(cli("show", *there, "--format", "json"))[0]["revoked"] is None
    cli("import", tmp_path / "out.jsonl", "--trust", *there)
    assert "not honoured" not in cli("revoke", "--list", *there)
    assert json.loads(cli("show", *there, "--format", "json"))[0]["revoked"] == "a race"


def test_a_shipped_revocation_cannot_be_undone(cli, tmp_path):
    with Registry.open(tmp_path / "shipped.db", write=True) as registry:
        registry.revoke(Revocation(ATTENTION.name, "triton", "a race", config=WINNER, origin="shipped"))
    (listed,) = json.loads(cli("revoke", "--list", "--format", "json"))
    assert "is in the shipped layer" in cli("revoke", "--undo", listed["id"], status=2)
    assert json.loads(cli("show", "--format", "json"))[0]["revoked"] == "a race"


def test_a_revocation_for_another_triton_says_that_nothing_changes_here(cli):
    said = cli("revoke", ATTENTION.name, "--triton", "<3", "--reason", "a race")
    assert "nothing changes on this machine" in said
    (listed,) = json.loads(cli("revoke", "--list", "--format", "json"))
    assert (listed["triton"], listed["kernel"]) == ("<3", None), "where the compiler is at fault, every source is meant"


def _second(q, k, v, form, scale, *extras, config):
    return q, q


def test_another_implementation_with_a_space_is_revoked_by_its_own_source_and_config(cli, monkeypatch):
    monkeypatch.setattr(ATTENTION, "implementations", dict(ATTENTION.implementations))
    space = Space({"TILE": (1, 2)}, lambda *_: None, lambda *_: Config(TILE=1))
    second = ATTENTION.implementation("second", space=space)(_second)
    ATTENTION.implementation("bought", space=space, external="some-package")(_second)
    name = ("revoke", ATTENTION.name, "--reason", "a race", "--implementation")
    cli(*name, "second", "--config", "TILE=2")
    cli(*name, "bought", "--config", "TILE=2")
    listed = json.loads(cli("revoke", "--list", "--format", "json"))
    assert {each["implementation"]: each["kernel"] for each in listed} == {"second": second.digest, "bought": None}
    assert all(each["config"] == {"TILE": 2} for each in listed)
    assert "not ours" in cli(*name, "bought", "--kernel", "current", status=2)
    assert "has no --config" in cli(*name, "cudnn", "--config", "TILE=2", status=2)


def test_another_implementation_is_revoked_whatever_our_source_is(cli):
    cli("revoke", ATTENTION.name, "--implementation", "cudnn", "--arch", "sm_90", "--reason", "NaN")
    (listed,) = json.loads(cli("revoke", "--list", "--format", "json"))
    assert (listed["implementation"], listed["config"], listed["kernel"]) == ("cudnn", {}, None)


def test_explain_answers_for_the_bucket_that_a_call_asks_for(cli):
    said = json.loads(cli("explain", "rms_norm_fwd", "--shape", "M4099,N5120", "--gpu", "H200", "--format", "json"))
    assert (said["problem"], said["asked"]) == ("M8192,N5120", "M4099,N5120")
    assert "rms_norm_fwd M4099,N5120 (asks for M8192,N5120)" in cli(
        "explain", "rms_norm_fwd", "--shape", "M4099,N5120", "--gpu", "H200"
    )


NEVER = "an-attention-that-nobody-has"


def _contest(*finalists):
    """A measured verdict on SHAPE: of each finalist its implementation, config, milliseconds and speed-up."""
    found = [
        Finalist(name, config, ms, ratio and Speedup(ratio, ratio - 0.01, ratio + 0.01), default=ratio == 1.0)
        for name, config, ms, ratio in finalists
    ]
    return dataclasses.replace(
        MEASURED, finalists=tuple(found), default_time_ms=2.0, interval=Speedup(4.0, 3.9, 4.1), environment=_NOW
    )


_NOW = Environment(dict(devices.environment()))
_OTHER = {**WINNER, "num_stages": 3}
_DEFAULT = {**WINNER, "num_warps": 4}


@pytest.fixture
def contest(cli, tmp_path, monkeypatch):
    """Explains SHAPE by a verdict of these finalists, of which `bought` is of a package that is not here."""
    monkeypatch.setattr(ATTENTION, "implementations", dict(ATTENTION.implementations))
    space = Space({"TILE": (1, 2)}, lambda *_: None, lambda *_: Config(TILE=1))
    ATTENTION.implementation("bought", space=space, external=NEVER, available=lambda device: False)(_second)

    def explained(*finalists, **changed):
        with Registry.open(tmp_path / "registry.db", write=True) as registry:
            registry.record(verdict=dataclasses.replace(_contest(*finalists), **changed))
        return cli(*EXPLAIN), json.loads(cli(*EXPLAIN, "--format", "json"))

    return explained


def test_explain_prints_the_numbers_of_what_runs_and_why_the_winner_does_not(contest):
    text, data = contest(
        ("bought", {"TILE": 1}, 0.5, 4.0),
        ("bought", {"TILE": 2}, 0.4, 5.0),
        ("triton", WINNER, 1.25, 1.6),
        ("triton", _OTHER, 1.3, 1.5),
        ("cudnn", {}, 1.75, 1.1),
        ("triton", _DEFAULT, 2.0, 1.0),
    )
    (runs,) = [line for line in text.splitlines() if line.startswith("  runs ")]
    assert runs.split()[1] == "triton"
    assert data["config"] == WINNER
    (measured,) = [line for line in text.splitlines() if line.startswith("  measured ")]
    assert measured == (
        "  measured 1.25 ms, 1.600x [1.590, 1.610] the default config (2 ms); bought 0.5 ms; cudnn 1.75 ms"
    )
    assert f"  not      bought TILE=1 (0.5 ms): {NEVER} is not installed here" in text.splitlines()
    assert [each["config"] for each in data["passed_over"]] == [{"TILE": 1}, {"TILE": 2}]
    assert data["measured"] == {
        "time_ms": 1.25, "predicted_ms": None, "others": {"bought": 0.5, "cudnn": 1.75}, "speedup": 1.6
    }  # fmt: skip
    assert data["verdict"]["implementation"] == "bought", "the verdict's row is the verdict's"


def test_explain_says_that_the_default_of_a_verdict_runs_where_its_winner_is_revoked(contest, cli):
    cli("revoke", ATTENTION.name, "--config", "num_stages=3", "--reason", "a race")
    text, data = contest(("triton", _OTHER, 1.0, 4.0), ("triton", _DEFAULT, 2.0, 1.0))
    assert data["config"] == _DEFAULT
    assert "  measured 2 ms, the default config\n" in text
    assert data["passed_over"] == [], "what is revoked is said in a line of its own"


def test_explain_says_why_nothing_of_an_exact_verdict_runs(contest):
    text, data = contest(("bought", {"TILE": 1}, 0.5, 4.0), ("flex_attention", {}, 1.0, 2.0))
    assert data["verdict"] is None
    assert "of the measured verdict for exactly this problem, layer explicit, nothing may run here" in text
    assert f"bought TILE=1 (0.5 ms): {NEVER} is not installed here" in text
    assert "flex_attention (1 ms): it compiles for seconds" in text


def test_explain_says_that_what_took_less_time_than_the_winner_was_its_equal(contest):
    text, _ = contest(("triton", WINNER, 1.25, 1.6), ("cudnn", {}, 1.24, 1.61), ("triton", _DEFAULT, 2.0, 1.0))
    assert "cudnn 1.24 ms (what took less time was its equal within the noise, or was not confirmed)" in text
