"""What a budget buys: who gets how much of it, when a run ends, what a later run goes on with. Time is simulated."""

import signal
import threading
import time

import pytest
from fakes import Clock, FakePool, FakeRunner, TimedRunner, tune
from test_session import BEST, valley
from toy import Scaling, make_op

from tilebook.errors import TuningError
from tilebook.op import Config
from tilebook.registry import Registry, VerdictStatus
from tilebook.tuner.budget import _GUESSES, Budget, Job
from tilebook.tuner.explore import PATIENCE
from tilebook.tuner.progress import Run

SHAPES = [Scaling(64 << n, 64) for n in range(8)]  # the last is the heaviest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


def flexible():
    """The toy op with an implementation that compiles for seconds when it is first called."""
    op = make_op()
    op.implementation("flex")(lambda x: x * 3)
    op.implementation("cudnn")(lambda x: x * 3)
    return op


def times(candidate):
    return valley(candidate) if candidate.config else 2.0


def budgeted(path, seconds, problems=SHAPES, gpus=1, weights=None, op=None, **costs):
    """A run over the problems with so many seconds; returns (states, registry, clock, runners)."""
    clock = Clock()
    runners = [TimedRunner(clock, times, **costs) for _ in range(gpus)]
    run = Run(len(problems), True, Budget(seconds, clock=clock), gpus)
    states, registry = tune(path, runners, problems=problems, run=run, weights=weights, op=op or flexible())
    return states, registry, clock, runners


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seconds", [5, 20, 40, 120])
@pytest.mark.parametrize(
    "costs",
    [{}, {"flex": 8.0, "cudnn": 1.5}, {"attempt": 2.0, "verify": 2.0}, {"prepare": 8.0, "truths": 8.0, "flex": 15.0}],
    ids=str,
)
def test_a_run_ends_in_its_time_and_says_of_every_problem_what_became_of_it(path, seconds, costs):
    states, registry, clock, _ = budgeted(path, seconds, **costs)
    assert clock.now <= 1.15 * seconds + 20
    assert len(states) == len(SHAPES)
    assert [state.label for state in states] == [problem.label for problem in SHAPES]
    assert not any(state.error for state in states)
    assert all((state.verdict is None) == bool(state.unreached) for state in states)
    assert len(registry.verdicts()) == sum(state.verdict is not None for state in states)


def test_confirmation_and_other_implementations_are_inside_the_budget(path):
    states, _, clock, _ = budgeted(path, 60.0, flex=8.0)
    assert sum(state.verdict is not None for state in states) >= 2
    assert clock.now <= 60 * 1.15


def test_what_is_worth_most_comes_first_and_has_most_of_the_time(path):
    states, _, _, (runner,) = budgeted(path, 60.0)
    assert runner.problems[0] == SHAPES[-1].label, "by the least time of a call, where nobody says"
    assert states[-1].verdict is not None
    assert states[0].unreached == "the budget was spent before its turn"
    assert SHAPES[0].label not in runner.problems
    weights = [1.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    states, _, _, (runner,) = budgeted(path.with_name("weighed.db"), 60.0, weights=weights)
    assert runner.problems[0] == SHAPES[1].label
    assert states[1].verdict is not None


def test_where_there_is_time_for_all_each_has_what_it_needs(path):
    _, registry, _, _ = budgeted(path, 3600.0, SHAPES[:3])
    assert len(registry.verdicts()) == 3
    for verdict in registry.verdicts():
        assert verdict.status is VerdictStatus.MEASURED
        assert Config(verdict.config) == BEST
        assert (verdict.notes["unmeasured"], verdict.notes["unconfirmed"]) == ([], 0)
        assert verdict.notes["searches"]["triton"]["ended"] == "converged"
    again, _, clock, _ = budgeted(path, 3600.0, SHAPES[:3])
    assert all(state.skipped for state in again)
    assert clock.now == 0.0


def test_a_share_is_what_a_problem_needs_and_a_part_of_what_is_over_by_weight():
    clock = Clock()
    budget = Budget(100.0, clock=clock)
    one, heavy = Job("a", 1.0), Job("a", 3.0)
    need = budget.least(one)
    over = 100.0 - 2 * need
    assert budget.share([heavy, one]) == pytest.approx(need + over * 3 / 4)
    assert budget.share([one, heavy]) == pytest.approx(need + over / 4)
    assert budget.share([one]) == pytest.approx(100.0)
    assert budget.share([one] * 4, gpus=4) == pytest.approx(100.0)
    assert budget.share([one] * 1000) == pytest.approx(need, rel=0.2), "to as many as it is enough for, from the first"
    assert Budget().share([one]) == float("inf")
    clock.now = 105.0
    assert budget.share([one]) is None


def test_an_implementation_that_there_is_no_time_for_is_left_out_and_named(path):
    states, _, _, _ = budgeted(path, 70.0, flex=20.0, problems=SHAPES[:4])
    first, *later = [state.verdict.notes["unmeasured"] for state in reversed(states) if state.verdict is not None]
    assert later, "once a run has seen how long it takes, the next problem is tuned without it"
    assert "flex" not in first
    assert all(names == ["flex"] for names in later)


def test_what_another_function_of_pytorchs_runs_is_measured_however_short_the_time(path):
    op = flexible()
    op.captured = "flex"
    _, registry, _, _ = budgeted(path, 70.0, flex=12.0, problems=SHAPES[:4], op=op)
    verdicts = registry.verdicts()
    assert verdicts
    for verdict in verdicts:
        assert "flex" in {each.implementation for each in verdict.finalists}
        assert "flex" not in verdict.notes["unmeasured"]


def test_a_verdict_that_the_budget_cut_short_goes_on_in_a_later_run(path):
    one = SHAPES[:1]
    states, registry, _, (first,) = budgeted(path, 16.0, problems=one, attempt=0.5)
    (cut,) = registry.verdicts()
    assert cut.notes["searches"]["triton"]["ended"] == "budget"
    states, registry, _, (second,) = budgeted(path, 600.0, problems=one, attempt=0.5)
    assert not states[0].skipped
    ours = [c for c in second.attempted if c.config]
    assert ours
    assert not set(ours) & {c for c in first.attempted if c.config}, "what was tried is known"
    (whole,) = registry.verdicts()
    assert whole.notes["searches"]["triton"]["ended"] == "converged"
    assert Config(whole.config) == BEST
    states, *_ = budgeted(path, 600.0, problems=one)
    assert states[0].skipped


def test_a_later_run_takes_what_was_not_reached_before_what_was_cut_short(path):
    first, _, _, _ = budgeted(path, 40.0, attempt=0.5)
    reached = {state.label for state in first if state.verdict is not None}
    assert reached
    _, _, _, (runner,) = budgeted(path, 40.0, attempt=0.5)
    assert runner.problems[0] not in reached


def test_more_candidates_than_a_verdict_was_limited_to_are_tried_by_a_run_that_may(path):
    runner = FakeRunner(lambda c: 1.0)
    tune(path, runner, trials=6)
    states, _ = tune(path, FakeRunner(lambda c: 1.0), trials=6)
    assert states[0].skipped
    more = FakeRunner(valley)
    states, registry = tune(path, more)
    assert not states[0].skipped
    assert Config(registry.verdicts()[0].config) == BEST


def test_a_winner_that_there_is_no_time_to_confirm_is_no_verdict_and_its_trials_stay(path):
    states, registry, _, _ = budgeted(path, 5.0, problems=SHAPES[:1], verify=30.0, truths=30.0)
    assert states[0].unreached
    assert "confirm" in states[0].unreached
    assert registry.verdicts() == []
    kept = len(registry.trials())
    assert kept
    states, registry, _, _ = budgeted(path, 900.0, problems=SHAPES[:1])
    assert states[0].reused > 0
    assert Config(registry.verdicts()[0].config) == BEST


def test_a_verdict_from_before_stands_where_a_run_finds_no_time_for_a_better_one(path):
    budgeted(path, 16.0, problems=SHAPES[:1], attempt=0.5)
    states, registry, _, _ = budgeted(path, 5.0, problems=SHAPES[:1], attempt=0.5, verify=30.0)
    assert states[0].unreached
    assert states[0].verdict == registry.verdicts()[0]


def test_several_gpus_share_the_budget(path):
    states, _, clock, runners = budgeted(path, 40.0, gpus=4)
    assert clock.now <= 4 * 40 * 1.15, "the fakes take their time one after the other"
    assert len({runner.problems[0] for runner in runners if runner.problems}) >= 1
    assert all(state.verdict is not None or state.unreached for state in states)
    assert len(states) == len(SHAPES)


def test_what_hangs_is_ended_by_the_real_clock(path, monkeypatch):
    monkeypatch.setattr("tilebook.tuner.budget.GRACE_S", 0.2)
    monkeypatch.setattr("tilebook.tuner.budget.SEARCH_S", 0.5)
    monkeypatch.setattr("tilebook.tuner.budget._GUESSES", dict.fromkeys(_GUESSES, 0.1))

    class Hanging(FakeRunner):
        closed = threading.Event()

        def confirm(self, candidates, rounds, seed, *, fresh=False):
            self.closed.wait(30)
            raise TuningError("the runner is closed")

        def close(self):
            self.closed.set()

    began = time.monotonic()
    run = Run(2, True, Budget(2.0))
    states, registry = tune(path, Hanging(valley), problems=SHAPES[:2], run=run)
    assert time.monotonic() - began < 20
    assert [bool(state.unreached) for state in states] == [True, True]
    assert "the budget ended while confirming" in {state.unreached for state in states}
    assert registry.verdicts() == []
    assert registry.trials()


def test_predictions_keep_to_a_budget_too(path):
    clock = Clock()

    class Slow(FakePool):
        def submit(self, op, implementation, problem, config):
            clock.now += 1.0
            return super().submit(op, implementation, problem, config)

    run = Run(len(SHAPES), False, Budget(30.0, measured=False, clock=clock))
    states, registry = tune(path, None, Slow(), SHAPES, run=run)
    assert clock.now <= 1.15 * 30 + 20
    assert states[-1].verdict is not None
    assert states[0].unreached == "the budget was spent before its turn"
    assert states[0].feasible == 0, "not even its space was listed"
    assert {verdict.status for verdict in registry.verdicts()} == {VerdictStatus.PREDICTED}


def test_a_prediction_that_the_budget_cut_short_goes_on_until_nothing_gains(path):
    clock = Clock()

    class Slow(FakePool):
        def submit(self, op, implementation, problem, config):
            clock.now += 1.0
            return super().submit(op, implementation, problem, config)

    def predicted(seconds):
        pool = Slow()
        run = Run(1, False, Budget(seconds, measured=False, clock=clock))
        (state,), _ = tune(path, None, pool, SHAPES[:1], run=run)
        return state, set(pool.submitted)

    state, first = predicted(10.0)
    assert state.verdict.notes["searches"]["triton"]["ended"] == "budget"
    assert (tried := state.tried) > 0
    state, second = predicted(1000.0)
    assert not state.skipped
    assert second
    assert state.reused == tried, "what was tried is known"
    assert len(first & second) <= len(first) - tried, "compiled again is what nobody had looked at"
    assert state.verdict.notes["searches"]["triton"]["ended"] == "converged"
    assert len(first | second) < PATIENCE + 10 < state.feasible
    state, third = predicted(1000.0)
    assert (state.skipped, third) == (True, set())


def test_after_ctrl_c_every_problem_has_a_verdict_or_is_named_as_not_reached(path):
    class Interrupted(TimedRunner):
        def prepare(self, op, problem):
            super().prepare(op, problem)
            if len(self.problems) == 2:
                signal.raise_signal(signal.SIGINT)

    clock = Clock()
    run = Run(3, True, Budget(600.0, clock=clock))
    with pytest.raises(KeyboardInterrupt):
        tune(path, Interrupted(clock, valley), problems=SHAPES[:3], run=run)
    by_label = {state.label: state for state in run.done}
    assert set(by_label) == {problem.label for problem in SHAPES[:3]}
    assert by_label[SHAPES[2].label].verdict is not None
    assert {by_label[problem.label].unreached for problem in SHAPES[:2]} == {"interrupted"}
    with Registry.open(path) as registry:
        assert len(registry.verdicts()) == 1


def test_the_candidates_of_a_verdict_under_a_budget_have_the_default_the_winner_and_the_best_other(path):
    _, registry, _, _ = budgeted(path, 16.0, problems=SHAPES[:1], attempt=0.5)
    (verdict,) = registry.verdicts()
    (default,) = [each for each in verdict.finalists if each.default]
    assert default.key == ("triton", make_op().tunable.space.default(SHAPES[0], None).key)
    assert len(verdict.finalists) >= 3


def test_what_pytorchs_own_function_runs_is_in_the_contest_however_short_the_time(path):
    """A verdict serves in its place: how far ahead it is must have been seen, not guessed from a first look."""
    op = flexible()
    op.fused = lambda problem: True
    states, *_ = budgeted(path, 30.0, problems=SHAPES[:1], attempt=0.5, verify=3.0, op=op)
    (verdict,) = [state.verdict for state in states]
    assert verdict is not None
    assert verdict.notes["unconfirmed"] > 0
    assert "torch" in {each.implementation for each in verdict.finalists}
