"""What is told of a program's calls: shares, what verdicts promise, what tuning may bring, and what it is to take."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from dispatch_samples import COMPOSED, FUSED, GPU, OP, RANKED, composed, verdict

from tilebook.cli import main
from tilebook.report.profile import together

NEAR = OP.problem.parse("B4,H16,S3000,D64", "bf16")
FAR = OP.problem.parse("B4,H16,S2048,D128", "bf16")
UNTAKEN = OP.problem.parse("B4,H16,S2048,D33", "bf16")


def noted(problem, calls=10, time_ms=1.0, served="torch", source="fallback", gpu=GPU.identity, **more):
    told = {"op": OP.name, "problem": problem.key, "gpu": gpu, "calls": calls, "time_ms": time_ms, "timed": True}
    return {**told, "waited": False, "served": served, "source": source, **more}


@pytest.fixture
def told(choose):
    """What processes wrote, each (seconds, steps, problems), beside these verdicts."""

    def reading(*processes, verdicts=()):
        choose(*verdicts)
        names = "seconds", "steps", "problems"
        written = [{"state": "done", **dict(zip(names, each, strict=True))} for each in processes]
        return together([*written, {"state": "begun"}], str(choose.path))

    return reading


def test_what_verdicts_promise_and_what_tuning_may_bring(told):
    problems = [
        noted(FUSED, 10, 1.0, "triton", "exact"),
        noted(NEAR, 20, 3.0),
        noted(FAR, 10, 4.0),
        noted(UNTAKEN, 10, 0.5),
        noted(COMPOSED, 10, 2.0, "triton", "default"),
    ]
    found = told((0.2, 10, problems), verdicts=[verdict(evidence=RANKED)])
    rows = {each.problem: each for each in found.rows}
    assert [each.problem for each in found.rows] == [NEAR, FAR, COMPOSED, FUSED, UNTAKEN]
    assert (rows[FUSED].promise, rows[FUSED].tuned, rows[FUSED].covered) == (pytest.approx(1.2), 1.0, True)
    assert (rows[NEAR].promise, rows[NEAR].tuned) == (1.0, pytest.approx(1.2))
    assert (rows[FAR].promise, rows[FAR].tuned) == (1.0, None), "of another head dimension nothing is known"
    assert (rows[UNTAKEN].promise, rows[UNTAKEN].tuned) == (1.0, 1.0), "no kernel of ours runs it"
    assert (rows[COMPOSED].promise, rows[COMPOSED].tuned) == (None, None)
    assert found.step_ms == pytest.approx(20.0)
    data = found.data()
    assert data["dispatched"] == pytest.approx(0.135 / 0.2)
    assert data["covered"] == pytest.approx(0.01 / 0.135)
    assert data["gained"] == pytest.approx((0.2 + 0.002) / 0.2)
    assert data["gain"] == pytest.approx(0.2 / (0.2 - 0.06 * (1 - 1 / 1.2)))
    text = found.text()
    assert text.startswith("10 steps of 20 ms, 67.5% of it in calls")
    (line,) = (line for line in text.splitlines() if "S3000" in line)
    assert line.split() == ["30.0%", "20", "3", "6", "1.00x", "1.20x", *line.split()[-5:]]
    assert line.endswith("attention_fwd B4,H16,S3000,D64 bf16  (torch, fallback)")


def test_what_runs_by_default_may_gain_what_the_nearest_verdict_gained_over_it(told):
    other = OP.problem.parse("B4,H16,S3000,D64,causal,window128x0", "bf16")
    (row,) = told(
        (1.0, 0, [noted(other, served="triton", source="default")]), verdicts=[composed(evidence=RANKED)]
    ).rows
    assert row.tuned == pytest.approx(2.0)


def test_processes_are_put_together(told):
    found = told((1.0, 4, [noted(FUSED, 10, 1.0)]), (1.5, 4, [noted(FUSED, 30, 2.0), noted(NEAR, 1, 1.0)]))
    row, _ = found.rows
    assert (row.calls, row.time_ms) == (40, pytest.approx(1.75))
    assert (found.seconds, found.steps, found.processes) == (2.5, 8, 2)
    assert " of 2 processes" in found.text()


def test_a_tune_takes_the_heaviest_until_nearly_all_is_covered(told):
    problems = [noted(FUSED, time_ms=50.0), noted(UNTAKEN, time_ms=1.0), noted(FAR, time_ms=46.0), noted(NEAR)]
    found = told((1.0, 1, [*problems, noted(COMPOSED, time_ms=2.0)]))
    assert [each.problem for each in found.wanted()] == [FUSED, FAR]


def test_calls_on_no_gpu_and_those_that_were_not_timed_are_told_as_such(told):
    guessed = noted(FUSED, timed=False)
    waiting = noted(NEAR, time_ms=0.5, waited=True)
    found = told((1.0, 0, [guessed, waiting, noted(FAR, gpu=[], time_ms=0.1), noted(COMPOSED, time_ms=None)]))
    assert [each.problem for each in found.rows] == [FUSED, NEAR, FAR]
    assert (found.rows[2].promise, found.rows[2].tuned, found.wanted()[-1:]) == (None, None, [found.rows[1]])
    first, second, third = found.text().splitlines()[2:5]
    assert "≈" in first
    assert "≤" in second
    assert "unknown" in third
    assert found.step_ms is None


def test_tune_takes_them_and_shows_the_step_before_and_after(told, monkeypatch, tmp_path):
    profiles = [told((1.0, 10, [noted(NEAR, time_ms=3.0), noted(FUSED, time_ms=50.0)]))]
    profiles.append(replace(profiles[0], seconds=0.8))
    runs, tuned = iter(profiles), []

    def tune(problems, **how):
        tuned.append((problems, how["weights"], how["registry"], how["budget_s"]))
        return SimpleNamespace(interrupted=False)

    monkeypatch.setattr("tilebook.cli.profile._run", lambda *_: (0, next(runs)))
    monkeypatch.setattr("tilebook.tuner.run.tune_problems", tune)
    out = tmp_path / "out.json"
    told_ = CliRunner().invoke(main, ["profile", "--tune", "--budget", "5m", "--json", str(out), "--", "program"])
    assert told_.exit_code == 0, told_.output
    assert tuned == [([(OP, FUSED), (OP, NEAR)], [0.5, 0.03], None, 300.0)]
    assert "before 100 ms a step, after 80: 1.250x" in told_.output
    data = json.loads(out.read_text())
    assert [data[name]["step_ms"] for name in ("before", "after")] == pytest.approx([100, 80])
