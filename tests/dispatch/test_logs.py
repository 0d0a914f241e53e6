"""`TILEBOOK_LOG`: each new problem's choice is explained, once; nothing is said where nobody asked."""

import logging

import pytest
from dispatch_samples import COMPOSED, FUSED, OP, OTHER, RANKED, composed, verdict

import tilebook
from tilebook import enabling, logs


@pytest.fixture
def log(monkeypatch):
    """The logger as a program finds it."""
    made = logging.Logger("tilebook of a test", logging.WARNING)
    monkeypatch.setattr(logs, "log", made)
    monkeypatch.delenv(logs.ASKED, raising=False)
    return made


def test_each_new_problem_is_explained_once(choose, log, monkeypatch, capfd):
    monkeypatch.setenv(logs.ASKED, "debug")
    logs.begin()
    logs.begin()
    near = OP.problem.parse("B4,H16,S3000,D64,causal,window128x0", "bf16")
    choose(verdict(evidence=RANKED), composed())
    for problem in (FUSED, near, FUSED, OP.problem.parse("B4,H16,S2048,D33", "bf16"), near):
        choose.again(problem)
    exact, nearest, other = capfd.readouterr().err.splitlines()
    assert exact.startswith(f"tilebook: attention_fwd B4,H16,S2048,D64 bf16: triton BLOCK_M={OTHER['BLOCK_M']} ")
    assert exact.endswith(" (by the measured verdict on just this problem, layer explicit)")
    assert f"{near.label} bf16: triton" in nearest
    assert nearest.endswith(f"(by the measured verdict on {COMPOSED.label}, layer explicit)")
    assert other.startswith("tilebook: attention_fwd B4,H16,S2048,D33 bf16: torch (PyTorch's own")


def test_a_default_is_explained(choose, log, monkeypatch, capfd):
    monkeypatch.setenv(logs.ASKED, "DEBUG")
    logs.begin()
    choose(problem=COMPOSED)
    assert "(our kernel's default: no verdict is near that can serve)" in capfd.readouterr().err


@pytest.mark.parametrize("asked", [None, "", "info", "louder"])
def test_otherwise_it_is_quiet(choose, log, monkeypatch, capfd, asked):
    if asked is not None:
        monkeypatch.setenv(logs.ASKED, asked)
    logs.begin()
    choose(verdict(evidence=RANKED))
    said = "tilebook: TILEBOOK_LOG=louder is no level such as debug or info\n" if asked == "louder" else ""
    assert capfd.readouterr().err == said
    assert len(log.handlers) == bool(asked)


@pytest.mark.parametrize("here", [True, False])
def test_where_there_is_no_gpu_it_is_said_that_all_stays_pytorch_s(log, monkeypatch, capfd, here):
    monkeypatch.setenv(logs.ASKED, "debug")
    monkeypatch.setattr(enabling, "log", log)
    monkeypatch.setattr("tilebook.device.present", lambda: here)
    logs.begin()
    tilebook.enable()
    tilebook.disable()
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "on, in the places of" in line]
    assert said.endswith("for tensors on a GPU") is here
    assert ("there is none here, so that all stays PyTorch's" in said) is not here
