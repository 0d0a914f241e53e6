"""A few of the changed records of `benchmarks/reliability/mutants.py`, through every command that meets them."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "reliability"))
mutants = importlib.import_module("mutants")

QUICK = (
    "rms_norm",
    "--shape",
    "M64,N64",
    "--direction",
    "fwd",
    "--gpu",
    mutants.GPU,
    "--trials",
    "1",
    "--workers",
    "1",
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tunes for a GPU that is not here")


def test_a_seed_makes_the_same_mutants_and_most_of_them_differ():
    first, again = ([mutants.text_of(each) for _, each in mutants.mutants(3, 60)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 50


@pytest.mark.usefixtures("forked")
def test_no_changed_record_breaks_a_command_or_changes_what_serves(monkeypatch):
    monkeypatch.setattr(mutants, "LONGEST", 120.0)  # seconds are the program's to watch, on a machine of its own
    monkeypatch.setattr(mutants, "TUNE", QUICK)
    outcome = mutants.run(50, seed=5, batch=50)
    assert outcome.faults == []
    assert outcome.mutants == 50
    assert 5 < outcome.accepted < 45


@pytest.mark.long
def test_the_program_sees_what_is_wrong(monkeypatch):
    monkeypatch.setattr(mutants, "LONGEST", -1.0)
    monkeypatch.setattr(mutants.Attempt, "_tune", lambda self, number: self.fault(None, "tuned"))
    monkeypatch.setattr(mutants.Attempt, "choices", lambda self, registry=None: registry)
    faults = mutants.run(2, batch=2).faults
    assert any("import took" in each for each in faults)
    assert any("dispatch chose otherwise" in each for each in faults)
    assert "after a batch: tuned" in faults
