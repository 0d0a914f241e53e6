"""The last step of a tune: finalists are verified and timed together, and the winner again in a fresh process."""

import pytest
from fakes import FakeRunner, tune
from test_session import BEST, valley
from toy import SPACE

from tilebook.errors import TuningError
from tilebook.op import Config
from tilebook.registry import Failure, Status, VerdictStatus
from tilebook.tuner.process.runner import Candidate

DEFAULT = Candidate("triton", SPACE.default(None, None))
WINNER = Candidate("triton", BEST)
TORCH = Candidate("torch")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


class TwoProcesses(FakeRunner):
    """Takes other times once a fresh process has taken over."""

    def __init__(self, first, later) -> None:
        super().__init__(first)
        self._later = later

    def confirm(self, candidates, rounds, seed, *, fresh=False):
        if fresh:
            self._time_ms = self._later
        return super().confirm(candidates, rounds, seed, fresh=fresh)


def test_finalists_default_and_other_implementations_run_together_then_the_winner_in_a_fresh_process(path):
    runner = FakeRunner(valley)
    _, registry = tune(path, runner)
    (together, fresh), (again, fresh_again) = runner.confirmed
    assert not fresh
    assert together[0] == DEFAULT
    assert {WINNER, TORCH} < set(together)
    assert len(together) > 4
    assert fresh_again
    assert again == (DEFAULT, WINNER)
    (again,) = [each for each in registry.verdicts()[0].finalists if each.again is not None]
    assert again.implementation == "triton"
    assert len(again.again.samples_ms) == len(again.again.default_samples_ms) == 30


def test_no_fresh_process_is_needed_where_nothing_beats_the_default(path):
    runner = FakeRunner(lambda c: 1.0 if c == DEFAULT else 1.5)
    _, registry = tune(path, runner)
    assert [fresh for _, fresh in runner.confirmed] == [False]
    (verdict,) = registry.verdicts()
    assert verdict.status is VerdictStatus.DEFAULT
    assert not any(each.again for each in verdict.finalists)


def test_what_the_fresh_process_does_not_confirm_is_not_promoted(path):
    runner = TwoProcesses(valley, lambda c: 1.0)
    _, registry = tune(path, runner)
    (verdict,) = registry.verdicts()
    assert verdict.status is VerdictStatus.DEFAULT
    assert Config(verdict.config) == DEFAULT.config
    assert [fresh for _, fresh in runner.confirmed] == [False, True, False, False]
    assert sum(each.again is not None for each in verdict.finalists) == 3


def test_the_next_finalist_has_its_turn_where_the_first_does_not_hold(path):
    runner = TwoProcesses(valley, lambda c: 9.0 if c == WINNER else valley(c))
    _, registry = tune(path, runner)
    (verdict,) = registry.verdicts()
    assert verdict.status is VerdictStatus.MEASURED
    assert Config(verdict.config) != BEST
    assert valley(Candidate("triton", Config(verdict.config))) < 1.1


def test_a_finalist_that_fails_at_last_is_stored_by_class_and_the_next_moves_up(path):
    runner = FakeRunner(valley)
    runner.unsound = {WINNER: Failure.NOT_REPEATABLE}
    states, registry = tune(path, runner)
    assert [WINNER in together for together, _ in runner.confirmed] == [True, False, False]
    (verdict,) = registry.verdicts()
    assert Config(verdict.config) != BEST
    assert BEST not in [Config(each.config) for each in verdict.finalists]
    ends = [(t.status, t.failure) for t in registry.trials() if Config(t.config) == BEST]
    assert ends == [(Status.OK, None), (Status.FAILED, Failure.NOT_REPEATABLE)]
    assert states[0].rejected[Failure.NOT_REPEATABLE] == 1
    assert states[0].tried == len({(t.implementation, Config(t.config)) for t in registry.trials()})


def test_a_winner_that_fails_in_the_fresh_process_is_no_candidate_any_more(path):
    class FailsLater(FakeRunner):
        def confirm(self, candidates, rounds, seed, *, fresh=False):
            if fresh:
                self.unsound = {WINNER: Failure.WRONG_ANSWER}
            return super().confirm(candidates, rounds, seed, fresh=fresh)

    _, registry = tune(path, FailsLater(valley))
    (verdict,) = registry.verdicts()
    assert Config(verdict.config) != BEST
    assert BEST not in [Config(each.config) for each in verdict.finalists]
    assert BEST not in [Config(each["config"]) for each in verdict.notes["tied"]]


def test_a_finalist_that_failed_at_last_does_not_come_back_in_a_resumed_run(path):
    class Dying(FakeRunner):
        def confirm(self, candidates, rounds, seed, *, fresh=False):
            if self.confirmed:
                raise TuningError("the machine is going down")
            return super().confirm(candidates, rounds, seed, fresh=fresh)

    dying = Dying(valley)
    dying.unsound = {WINNER: Failure.WRONG_ANSWER}
    states, _ = tune(path, dying)
    assert "going down" in states[0].error
    resumed = FakeRunner(valley)
    _, registry = tune(path, resumed)
    assert all(WINNER not in together for together, _ in resumed.confirmed)
    assert Config(registry.verdicts()[0].config) != BEST


def test_a_default_that_fails_at_last_is_an_error_that_the_next_run_looks_into_again(path):
    runner = FakeRunner(valley)
    runner.unsound = {DEFAULT: Failure.WRONG_ANSWER}
    states, registry = tune(path, runner)
    assert "default" in states[0].error
    assert registry.verdicts() == []
    tune(path, FakeRunner(valley))
    assert Config(registry.verdicts()[0].config) == BEST


def test_the_tied_are_named_in_the_evidence(path):
    def level(candidate):
        return valley(candidate) if candidate.config.get("BLOCK") == 16 else 1.0

    _, registry = tune(path, FakeRunner(lambda c: 2.0 if c == TORCH else level(c), noise=0.001))
    tied = [Config(each["config"]) for each in registry.verdicts()[0].notes["tied"]]
    assert len(tied) == len(set(tied)) > 10
    assert all(config["BLOCK"] > 16 for config in tied)
    assert Config(registry.verdicts()[0].config) in tied
