"""Verdicts looked at again: what is wrong or slow here is found and no longer served, the rest is left as it is."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from audit_samples import LATER, OP, PROBLEMS, TORCH, WINNER, Shop, outcomes, times
from fakes import ENVIRONMENT, GPU, Clock, FakeRunner, TimedRunner
from test_session import BEST, valley

from tilebook.op import Config
from tilebook.registry import Device, Environment, Failure, Miss
from tilebook.tuner.audit.subjects import AUDIT, VERIFY, Outcome, nearest_first, sampled, subjects
from tilebook.tuner.session import Options

# Verify


# Real workers


# Audit


def test_an_audit_leaves_what_holds_as_it_is_and_looks_at_it_once(shop, evidence):
    runner = FakeRunner(valley)
    assert outcomes(shop.look(AUDIT, runner)) == {Outcome.KEPT}
    assert set(runner.attempted) == {WINNER, TORCH}
    assert runner.confirmed == []
    assert [shop.verdict(problem) for problem in PROBLEMS] == evidence
    assert shop.look(AUDIT, FakeRunner(valley)) == {}
    assert len(shop.look(AUDIT, FakeRunner(valley), {**LATER, "triton": "3.9.0"})) == len(PROBLEMS)


def test_a_winner_that_became_slow_is_demoted_and_one_that_became_wrong_is_quarantined(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    (slow,) = shop.look(AUDIT, FakeRunner(times({WINNER: 1.5}))).values()
    assert slow.outcome is Outcome.DEMOTED
    assert Config(shop.verdict().config) != BEST
    assert shop.verdict().environment == Environment(LATER)
    shop = Shop(tmp_path / "other.db", evidence[:1])
    assert outcomes(shop.look(AUDIT, FakeRunner(times({WINNER: Failure.WRONG_ANSWER})))) == {Outcome.QUARANTINED}


def test_a_winner_that_became_slow_and_is_still_the_best_stays(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", evidence[:1])
    slower = FakeRunner(lambda c: valley(c) * (1.3 if c.implementation == "triton" else 1.0))
    assert outcomes(shop.look(AUDIT, slower)) == {Outcome.KEPT}
    assert shop.verdict() == evidence[0]


def test_a_gpu_that_is_slower_as_a_whole_costs_no_second_look(shop):
    runner = FakeRunner(lambda c: 1.1 * valley(c))
    assert outcomes(shop.look(AUDIT, runner)) == {Outcome.KEPT}
    assert set(runner.attempted) == {WINNER, TORCH}


def test_pytorch_that_gained_and_is_still_behind_costs_no_second_look(shop):
    runner = FakeRunner(times({TORCH: 0.7}))
    assert outcomes(shop.look(AUDIT, runner)) == {Outcome.KEPT}
    assert set(runner.attempted) == {WINNER, TORCH}


def test_pytorch_that_got_ahead_serves(shop):
    findings = shop.look(AUDIT, FakeRunner(times({TORCH: 0.4})))
    assert outcomes(findings) == {Outcome.DEMOTED}
    assert {each.served for each in findings.values()} == {"torch"}


def test_an_audit_that_is_interrupted_goes_on_with_the_rest(shop):
    class Stopping(FakeRunner):
        def prepare(self, op, problem):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    runner = Stopping(valley)
    runner.left = 3
    with pytest.raises(KeyboardInterrupt):
        shop.look(AUDIT, runner)
    assert len(shop.look(AUDIT, FakeRunner(valley))) == len(PROBLEMS) - 2


def test_what_the_budget_does_not_reach_is_said_and_stays(shop):
    clock = Clock()
    findings = shop.look(AUDIT, TimedRunner(clock, valley, prepare=10.0), budget_s=18.0, clock=clock)
    said = [each.outcome for each in findings.values()]
    assert said == [Outcome.KEPT] * 2 + [Outcome.NOT_REACHED] * 2
    assert clock.now <= 22
    assert len(shop.look(AUDIT, FakeRunner(valley))) == 2


def test_the_like_of_what_regressed_comes_next_nearest_first(shop):
    found = {each.problem: each for each in subjects(shop.layers, shop.bench(None), AUDIT)}
    far, near, nearest, regressed = (found[problem] for problem in (PROBLEMS[0], *PROBLEMS[1:]))
    other = dataclasses.replace(far, winner=TORCH)
    assert nearest_first([other, far, near, nearest], regressed) == [nearest, near, far, other]


def test_an_audit_goes_on_with_the_like_of_what_regressed(shop):
    class OneSlow(FakeRunner):
        def prepare(self, op, problem):
            self._time_ms = times({WINNER: 1.5}) if problem == first else valley

    order = [each.problem for each in sampled(subjects(shop.layers, shop.bench(None), AUDIT), 0)]
    first, *rest = order
    near = sorted(rest, key=first.distance)
    assert near != rest
    findings = shop.look(AUDIT, OneSlow(valley))
    assert list(findings) == [first, *near]
    assert [each.outcome for each in findings.values()] == [Outcome.DEMOTED] + [Outcome.KEPT] * len(rest)


def test_a_sample_prefers_what_programs_use(shop):
    used = PROBLEMS[0]
    with shop.layers.writer() as registry:
        registry.count_misses([Miss(OP.name, used.key, Device(*GPU.identity), 1000, 1.0)])
    found = subjects(shop.layers, shop.bench(None), AUDIT)
    assert (found[0].problem, found[0].weight) == (used, 1.0)
    assert all(sampled(found, seed)[0].problem == used for seed in range(20))
    alike = [dataclasses.replace(each, weight=1.0) for each in found]
    assert {sampled(alike, seed)[0].problem for seed in range(40)} == set(PROBLEMS)


def test_what_would_not_be_served_whatever_is_found_is_left_out(tmp_path, evidence):
    other = dataclasses.replace(evidence[0], device=Device("NVIDIA A100", "sm_80", 108))
    retired = dataclasses.replace(evidence[1], kernel="0" * 64)
    shop = Shop(tmp_path / "r.db", [other, retired, evidence[2]])
    assert [each.verdict.problem for each in subjects(shop.layers, shop.bench(None), VERIFY)] == [evidence[2].problem]
    assert subjects(shop.layers, shop.bench(None, ENVIRONMENT), VERIFY) == [], "nothing has changed"


def test_another_python_makes_nothing_stale(tmp_path, evidence):
    shop = Shop(tmp_path / "r.db", [dataclasses.replace(evidence[0], environment=Environment({"python": "3.11"}))])
    assert subjects(shop.layers, shop.bench(None, {"python": "3.12"}), VERIFY) == []


# Recorded sweeps


@pytest.fixture(scope="module")
def program():
    path = Path(__file__).parents[2] / "benchmarks" / "audit.py"
    spec = importlib.util.spec_from_file_location("audit_program", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_planted_regressions_of_recorded_sweeps_are_found_and_none_of_the_others_is_demoted(program):
    names = ("mlp_act_bwd-M4096-H768-I3072-bf16", "attention_fwd-B4-H16-S2048-D64-bf16")
    sweeps = [program.read(program.SWEEPS / f"{name}.jsonl") for name in names]
    verdicts = [each for sweep in sweeps for each in program.tuned(sweep, options=Options(trials=12))]
    total = program.summary([program.judge(verdicts, seed) for seed in range(5)])
    assert total["regressed"] >= 4
    assert (total["missed"], total["false"]) == (0, 0)
    short = program.judge(verdicts, 0, share=0.05)
    assert short["looked_at"] < short["verdicts"]
    assert short["false"] == 0


def test_the_figures_that_are_told_of_the_audit_are_those_of_its_program(program):
    assert program.reached(json.loads((program.RESULTS).read_text(encoding="utf-8")))
