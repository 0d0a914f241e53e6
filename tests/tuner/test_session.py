"""A whole tuning run against a compiler and a GPU that answer from a formula, into a real registry."""

import dataclasses
from concurrent.futures import Future

import pytest
from fakes import FakePool, FakeRunner, tune
from toy import SPACE, Scaling, make_op

from tilebook.errors import CompilerError
from tilebook.op import Config
from tilebook.registry import Failure, Registry, Revocation, Status, VerdictStatus
from tilebook.tuner.explore import PATIENCE
from tilebook.tuner.process.runner import Candidate

BEST = Config(BLOCK=128, num_warps=4, num_stages=3)


def valley(candidate: Candidate) -> float:
    """The default (16, 1, 1) takes 4.2 ms, the best config 1 ms, PyTorch 2 ms."""
    if candidate.implementation == "torch":
        return 2.0
    config = candidate.config
    block, warps = config.number("BLOCK").bit_length() - 8, config.number("num_warps").bit_length() - 3
    return 1.0 + 0.2 * block**2 + 0.3 * warps**2 + 0.05 * (config.number("num_stages") - 3) ** 2


def flat(candidate: Candidate) -> float:
    return 1.0 if candidate.implementation == "triton" else 2.0


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


def test_finds_the_best_config_and_stores_the_evidence(path):
    states, registry = tune(path, FakeRunner(valley))
    (verdict,) = registry.verdicts()
    assert verdict.status is VerdictStatus.MEASURED
    assert (verdict.implementation, Config(verdict.config)) == ("triton", BEST)
    assert verdict.speedup == pytest.approx(valley(Candidate("triton", SPACE.default(None, None))), rel=0.02)
    assert verdict.speedup_low <= verdict.speedup <= verdict.speedup_high
    names = {each.implementation for each in verdict.finalists}
    assert names == {"triton", "torch"}
    assert all(len(each.samples_ms) == 30 for each in verdict.finalists)
    trials = registry.trials()
    assert len(trials) == states[0].tried
    assert all(trial.status is Status.OK and len(trial.samples_ms) == 15 for trial in trials)


def test_an_implementation_that_is_not_ours_can_win(path):
    _, registry = tune(path, FakeRunner(lambda c: 0.5 if c.implementation == "torch" else valley(c)))
    (verdict,) = registry.verdicts()
    assert (verdict.implementation, dict(verdict.config)) == ("torch", {})
    assert verdict.ranking()[1][0] == "triton"


def test_a_far_faster_implementation_does_not_push_ours_out_of_the_ranking(path):
    """Where it is not installed, the verdict still names our best config."""
    _, registry = tune(path, FakeRunner(lambda c: 0.1 if c.implementation == "torch" else valley(c)))
    (verdict,) = registry.verdicts()
    assert verdict.implementation == "torch"
    assert next(Config(config) for name, config in verdict.ranking() if name == "triton") == BEST


def test_equal_candidates_leave_the_default_standing(path):
    for seed in range(5):
        _, registry = tune(path, FakeRunner(flat, seed=seed), force=True, seed=seed, trials=20)
        (verdict,) = registry.verdicts()
        assert verdict.status is VerdictStatus.DEFAULT
        assert Config(verdict.config) == SPACE.default(None, None)
        assert verdict.speedup == verdict.speedup_low == 1.0


def test_wrong_and_broken_candidates_are_classified_and_never_win(path):
    classes = [
        Failure.WRONG_ANSWER,
        Failure.RUN_ERROR,
        Failure.RUN_TIMEOUT,
        Failure.WORKER_DIED,
        Failure.NOT_REPEATABLE,
    ]

    def risky(candidate):
        config = candidate.config
        if candidate.implementation == "torch":
            return 9.0
        if config.number("num_warps") >= 2:
            return classes[config.number("BLOCK").bit_length() % len(classes)]
        return valley(candidate)

    states, registry = tune(path, FakeRunner(risky))
    (verdict,) = registry.verdicts()
    assert verdict.config["num_warps"] == 1
    failed = [trial for trial in registry.trials() if trial.status is Status.FAILED]
    assert {trial.failure for trial in failed} <= set(classes)
    assert len(failed) == sum(states[0].rejected.values())
    assert verdict.notes["rejected"] == {f.value: n for f, n in sorted(states[0].rejected.items())}


def test_what_does_not_compile_is_rejected_with_its_class(path):
    pool = FakePool(broken=lambda c: "spills" if c.number("BLOCK") >= 128 else None)
    _, registry = tune(path, FakeRunner(valley), pool)
    rejected = [trial for trial in registry.trials() if trial.failure is Failure.SPILLS]
    assert rejected
    assert all(trial.status is Status.REJECTED for trial in rejected)
    assert registry.verdicts()[0].config["BLOCK"] < 128


def test_identical_machine_code_is_measured_once(path):
    runner = FakeRunner(flat)
    pool = FakePool(code=lambda c: str(c["BLOCK"]))
    states, _ = tune(path, runner, pool)
    measured = [c for c in runner.attempted if c.implementation == "triton"]
    assert len(measured) == len({c.config["BLOCK"] for c in measured})
    assert states[0].rejected[Failure.DUPLICATE_BINARY] > 0


def test_a_default_that_fails_is_an_error_and_no_verdict(path):
    default = SPACE.default(None, None)
    runner = FakeRunner(lambda c: Failure.WRONG_ANSWER if c.config == default else valley(c))
    states, registry = tune(path, runner)
    assert "default" in states[0].error
    assert registry.verdicts() == []


class _Killed(BaseException):
    pass


def test_a_run_cut_short_resumes_without_measuring_anything_twice(path):
    class Mortal(FakeRunner):
        def attempt(self, candidate, most_ms):
            if len(self.attempted) == 12:
                raise _Killed
            return super().attempt(candidate, most_ms)

    first, second = Mortal(valley), FakeRunner(valley)
    with pytest.raises(_Killed):
        tune(path, first)
    states, registry = tune(path, second)
    ours = [{c for c in runner.attempted if c.implementation == "triton"} for runner in (first, second)]
    assert not ours[0] & ours[1]
    assert states[0].reused == len(ours[0])
    assert Config(registry.verdicts()[0].config) == BEST


def test_a_finished_problem_is_skipped_unless_forced(path):
    tune(path, FakeRunner(valley))
    again = FakeRunner(valley)
    states, _ = tune(path, again)
    assert states[0].skipped
    assert again.attempted == []
    forced = FakeRunner(valley)
    tune(path, forced, force=True)
    assert forced.attempted


def test_an_imported_verdict_that_is_not_trusted_is_tuned_anew_and_replaced(path):
    tune(path, FakeRunner(valley))
    with Registry.open(path, write=True) as registry:
        (theirs,) = registry.verdicts()
        registry.record((), dataclasses.replace(theirs, origin="imported", trusted=False))
    states, registry = tune(path, FakeRunner(valley))
    assert not states[0].skipped
    assert registry.verdicts()[0].trusted


def _revoke(path, config, implementation="triton", **changes):
    with Registry.open(path, write=True) as registry:
        registry.revoke(Revocation("scaling_fwd", implementation, "wrong", config=config, **changes))


def test_a_revoked_winner_does_not_stand_and_tuning_finds_another(path):
    _, before = tune(path, FakeRunner(valley))
    assert Config(before.verdicts()[0].config) == BEST
    _revoke(path, {"num_warps": 4})
    runner = FakeRunner(valley)
    states, registry = tune(path, runner)
    (verdict,) = registry.verdicts()
    assert not states[0].skipped
    assert verdict.config["num_warps"] != 4
    assert verdict.status is VerdictStatus.MEASURED
    assert all(c.config.get("num_warps") != 4 for c in runner.attempted)
    feasible = SPACE.feasible(Scaling(64, 64), None)
    assert states[0].revoked == verdict.notes["revoked"] == sum(c["num_warps"] == 4 for c in feasible)
    assert states[0].feasible + states[0].revoked == len(feasible)
    again, _ = tune(path, FakeRunner(valley))
    assert again[0].skipped


@pytest.mark.parametrize("changes", [{"triton": ">=3.7"}, {"arch": "sm_80"}, {"kernel": "0" * 64}], ids=str)
def test_a_revocation_for_something_else_lets_the_verdict_stand(path, changes):
    tune(path, FakeRunner(valley))
    _revoke(path, dict(BEST), **changes)
    states, _ = tune(path, FakeRunner(valley))
    assert (states[0].skipped, states[0].revoked) == (True, 0)


def test_a_verdict_stands_when_a_config_that_lost_is_revoked(path):
    tune(path, FakeRunner(valley))
    _revoke(path, {"num_warps": 1})
    runner = FakeRunner(valley)
    states, _ = tune(path, runner)
    assert states[0].skipped
    assert states[0].revoked > 0
    assert runner.attempted == []


def test_a_revoked_default_is_not_run_and_what_stands_in_for_it_is_compared_with(path):
    default = SPACE.default(None, None)
    _revoke(path, dict(default))
    runner = FakeRunner(valley)
    states, registry = tune(path, runner)
    assert states[0].error == ""
    assert default not in {c.config for c in runner.attempted}
    (verdict,) = registry.verdicts()
    assert Config(verdict.config) == BEST
    assert verdict.speedup > 1


def test_an_implementation_that_is_revoked_is_not_measured(path):
    op = make_op()
    op.implementation("cudnn")(lambda x: x * 3)
    _revoke(path, {}, "cudnn")
    runner = FakeRunner(valley)
    tune(path, runner, op=op)
    assert {c.implementation for c in runner.attempted} == {"triton", "torch"}


def test_where_every_config_is_revoked_tuning_says_so(path):
    _revoke(path, {})
    runner = FakeRunner(valley)
    states, registry = tune(path, runner)
    assert states[0].error == "every config of triton is revoked"
    assert (runner.attempted, registry.verdicts()) == ([], [])


def test_trials_limit_the_candidates_before_the_polish(path):
    pool = FakePool()
    tune(path, FakeRunner(flat), pool, trials=10)
    near_default = len(list(SPACE.neighbours(SPACE.default(None, None))))
    assert 10 <= len(pool.submitted) <= 10 + 2 * 3 * 3 + near_default


def test_winner_of_the_nearest_problem_is_tried_right_after_the_default(path):
    tune(path, FakeRunner(valley), problems=[Scaling(64, 64)])
    runner = FakeRunner(valley)
    tune(path, runner, problems=[Scaling(128, 64)])
    ours = [c.config for c in runner.attempted if c.implementation == "triton"]
    assert ours[1] == BEST


def test_without_a_gpu_the_search_ends_when_the_model_sees_no_gain_any_more_and_nothing_is_claimed(path):
    pool, op = FakePool(), make_op()
    states, registry = tune(path, None, pool, op=op)
    assert PATIENCE <= len(pool.submitted) == states[0].compiled < len(SPACE.feasible(Scaling(64, 64), None))
    (verdict,) = registry.verdicts()
    assert verdict.notes["searches"]["triton"]["ended"] == "converged"
    assert verdict.status is VerdictStatus.PREDICTED
    assert (verdict.time_ms, verdict.speedup, verdict.default_time_ms) == (None, None, None)
    assert all(trial.time_ms is None and not trial.samples_ms for trial in registry.trials())


def test_a_measurement_replaces_a_prediction_but_not_the_reverse(path):
    tune(path, None)
    tune(path, FakeRunner(valley))
    states, registry = tune(path, None)
    assert states[0].skipped
    assert registry.verdicts()[0].status is VerdictStatus.MEASURED


def test_a_defect_of_ours_is_not_taken_for_a_problem_s_failure(path):
    class Defective(FakeRunner):
        def confirm(self, candidates, rounds, seed, *, fresh=False):
            raise RuntimeError("deque mutated during iteration")

    with pytest.raises(RuntimeError, match="deque mutated"):
        tune(path, Defective(valley))


def test_a_defect_of_a_compile_process_ends_one_candidate_and_not_the_run(path):
    class Broken(FakePool):
        def submit(self, op, implementation, problem, config):
            if config["BLOCK"] != 64:
                return super().submit(op, implementation, problem, config)
            future: Future = Future()
            future.set_exception(CompilerError("Traceback\n  a frame\nKeyError: 'out of luck'"))
            return future

    states, registry = tune(path, FakeRunner(valley), Broken())
    assert states[0].error == ""
    assert Config(registry.verdicts()[0].config) == BEST
    broken = [trial for trial in registry.trials() if trial.config.get("BLOCK") == 64]
    assert broken
    assert {(trial.failure, trial.reason) for trial in broken} == {(Failure.COMPILE_ERROR, "KeyError: 'out of luck'")}


def test_a_problem_that_our_kernel_does_not_run_is_refused_before_anything_is_compiled(path):
    op, pool = make_op(), FakePool()
    op.implementations["triton"] = dataclasses.replace(op.tunable, supports=lambda problem: False)
    states, registry = tune(path, FakeRunner(valley), pool, op=op)
    assert "does not run this problem" in states[0].error
    assert (pool.submitted, registry.verdicts()) == ([], [])
