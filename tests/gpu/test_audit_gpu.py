"""`tilebook verify` and `tilebook audit` on a GPU, over a small registry: a stale verdict, an import, a false claim."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from tilebook.cli import main
from tilebook.registry import Environment, Registry
from tilebook.registry.store import Choice

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TUNE = ("tune", "rms_norm", "--shape", "M4096,N1024", "--direction", "fwd", "--trials", "6")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(tmp_path / "registry.db"))
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "shipped.db")

    def start(*arguments):
        result = CliRunner().invoke(main, [*arguments, "--format", "json"])
        assert result.exit_code == 0, result.stderr or result.exception
        return json.loads(result.stdout)

    def verdict():
        with Registry.open(tmp_path / "registry.db") as registry:
            return registry.verdicts()[0]

    def put(verdict):
        with Registry.open(tmp_path / "registry.db", write=True) as registry:
            registry.merge(verdicts=[verdict], rule=lambda old, new: Choice(True, "a test"))

    start.verdict, start.put = verdict, put
    return start


def test_a_verdict_of_another_triton_is_audited_then_verified_and_is_of_this_one_after_that(cli):
    cli(*TUNE)
    now = cli.verdict()
    then = Environment({**now.environment.versions, "triton": "0.0.1"})
    cli.put(dataclasses.replace(now, environment=then))
    audited = cli("audit")
    assert audited["counts"]["kept"] == 1, audited
    assert cli.verdict().environment == then
    assert cli("audit")["looked_at_before"] == 1
    verified = cli("verify")
    assert verified["counts"]["kept"] == 1, verified
    assert cli.verdict().environment == now.environment


def test_an_import_is_trusted_once_it_was_verified_whatever_times_it_claims(cli):
    cli(*TUNE)
    now = cli.verdict()
    boast = dataclasses.replace(now.winner, time_ms=1e-6, default=False)
    others = [each for each in now.finalists[1:] if each.key != boast.key]
    cli.put(dataclasses.replace(now, finalists=(boast, *others), origin="imported", trusted=False))
    found = cli("verify")
    assert found["counts"]["quarantined"] == 0, found
    after = cli.verdict()
    assert after.trusted
    assert after.time_ms > 1e-4
