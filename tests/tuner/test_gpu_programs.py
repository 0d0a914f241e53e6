"""The programs that tune on a GPU again and again, with stand-ins for it: what they count is what happened."""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from fakes import ENVIRONMENT, GPU, FakePool
from test_session_statistics import NoisyRunner, rough
from toy import make_op

from tilebook.op import Config

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "benchmarks/results/nvidia-h200/sweeps/attention_fwd-B4-H16-S2048-D64-bf16.jsonl"


def program(name):
    spec = importlib.util.spec_from_file_location(f"{name}_program", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


agreement, resume = program("agreement"), program("resume")


def noisy_tunes(runs, budget_s=60.0):
    op, seeds = make_op(), iter(range(100))
    problem = op.problem(64, 64)
    found = agreement.tunes(
        op,
        problem,
        GPU,
        ENVIRONMENT,
        lambda: agreement.Bench(FakePool(), NoisyRunner(rough, next(seeds))),
        runs,
        budget_s,
    )
    return op, problem, list(found)


def test_agreement_tunes_anew_each_time_and_compares_every_pair():
    result = agreement.document(*noisy_tunes(4))
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2, 3]
    assert all(run["status"] == "measured" and run["tried"] > 16 and run["tied"] for run in result["runs"])
    assert (result["next"]["pairs"], result["all"]["pairs"]) == (3, 6)
    assert result["all"]["agree"] == sum(pair["agree"] for pair in result["pairs"])
    assert json.loads(json.dumps(result))["op"] == "scaling_fwd"
    assert "4 runs" in agreement.summary(result)


def test_two_verdicts_agree_by_winner_or_where_each_winner_is_in_the_others_tie_set():
    op, problem, ((verdict, seconds),) = noisy_tunes(1)
    a, b = Config(verdict.config), Config(verdict.config).replace(num_stages=4)
    a = a.replace(num_stages=1)

    def made(chosen, *tied):
        named = [{"implementation": "triton", "config": dict(config)} for config in tied]
        evidence = {**verdict.evidence, "tied": named}
        return dataclasses.replace(verdict, implementation="triton", config=dict(chosen), evidence=evidence)

    assert agreement.compared(made(a, a), made(a, a, b)) == {"same": True, "agree": True, "either": True}
    assert agreement.compared(made(a, a, b), made(b, a, b)) == {"same": False, "agree": True, "either": True}
    assert agreement.compared(made(a, a), made(b, a, b)) == {"same": False, "agree": False, "either": True}
    assert agreement.compared(made(a, a), made(b, b)) == {"same": False, "agree": False, "either": False}
    apart = agreement.document(op, problem, [(made(a, a), seconds), (made(b, b), seconds)])
    assert not agreement.reached(apart)
    assert agreement.reached(agreement.document(op, problem, [(made(a, a), seconds), (made(a, a), seconds)]))
    assert not agreement.reached(agreement.document(op, problem, [(made(a, a), seconds)])), "one run shows nothing"


def test_no_run_begins_without_time_to_end():
    assert len(noisy_tunes(50, budget_s=0.0)[2]) == 1


def test_agreement_over_a_recorded_sweep(tmp_path, monkeypatch, capsys):
    out = tmp_path / "agreement.json"
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--sweep", str(SWEEP), "--runs", "3", "--out", str(out)])
    assert agreement.main() == 0
    result = json.loads(out.read_text())
    assert result["next"] == {"pairs": 2, "agree": 2}
    assert "3 runs" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_tune_is_started_again_and_what_was_stored_is_compared(tmp_path, monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), *filter(None, sys.path)]))

    def command(path):
        return [sys.executable, str(here / "killing.py"), "--into", str(path), "0", "0.4"]

    result = resume.resumed(command, tmp_path, 1, 1)
    (kill,) = result["kills"]
    assert kill["status"] == -9
    assert 0 < kill["seen_before"] <= kill["stored_after"] <= result["resumed"]["trials"]
    assert (result["lost"], result["interrupted"], result["measured_twice"]) == (0, 1, 0)
    assert result["winner_in_tie_set"]
    assert resume.good(result)
    assert "0 trials lost" in resume.summary(result)
