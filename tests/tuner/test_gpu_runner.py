"""The two processes of a GPU: one measures, the other waits to take over, and nothing a candidate does ends the run."""

import sys
import time
from types import SimpleNamespace

import pytest

from tilebook.errors import TuningError
from tilebook.registry import Failure
from tilebook.tuner.process.runner import Candidate, GpuRunner, Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are killed by group")

OP = SimpleNamespace(answers=None, name="toy", implementations={})
GOOD, OTHER, CRASH, POISON = Candidate("good"), Candidate("other"), Candidate("crash"), Candidate("poison")


def problem(rows=1):
    return SimpleNamespace(key=f'{{"rows":{rows}}}')


@pytest.fixture
def runner():
    made = GpuRunner(3, worker="pair_worker")
    made.prepare(OP, problem())
    yield made
    made.close()


def measured_by(runner):
    return runner.attempt(GOOD, None).facts["pid"]


def test_a_fresh_confirmation_runs_in_a_process_that_was_there_before_and_ran_no_candidate(runner):
    first, spare = measured_by(runner), runner._spare.pid
    assert spare not in (None, first)
    (attempt,) = runner.confirm([GOOD], 5, 0)
    assert attempt.samples_ms == (first,) * 5
    (again,) = runner.confirm([GOOD], 5, 0, fresh=True)
    assert again.samples_ms == (spare,) * 5


def test_the_process_that_confirmed_measures_the_next_problem_and_another_one_becomes_the_spare(runner):
    first, spare = measured_by(runner), runner._spare.pid
    runner.confirm([GOOD], 1, 0, fresh=True)
    assert not runner._spare.alive
    runner.prepare(OP, problem(2))
    attempt = runner.attempt(GOOD, None)
    assert attempt.facts["pid"] == spare
    assert attempt.facts["asked"] == ["prepare", "confirm", "prepare", "attempt"]
    assert runner._spare.alive
    assert runner._spare.pid not in (first, spare)


def test_the_spare_has_started_before_anything_is_confirmed(runner):
    runner.confirm([GOOD], 1, 0)
    began = time.monotonic()
    assert runner._spare.request({"do": "probe"}, 5) == {"healthy": True}
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("candidate", "failure"), [(CRASH, Failure.WORKER_DIED), (POISON, Failure.RUN_ERROR)], ids=lambda x: str(x)
)
def test_the_spare_takes_over_from_a_process_that_a_candidate_broke(runner, candidate, failure):
    spare = runner._spare.pid
    assert runner.attempt(candidate, None).failure is failure
    attempt = runner.attempt(GOOD, None)
    assert attempt.failure is None
    assert attempt.facts["pid"] == spare
    assert attempt.facts["asked"] == ["prepare", "attempt"]
    assert runner._spare.alive


def test_the_next_spare_starts_while_the_process_that_takes_over_is_prepared(runner, monkeypatch):
    ask, seen = runner._ask, []

    def noting(message, limit_s):
        seen.append((message["do"], runner._spare.alive))
        return ask(message, limit_s)

    runner.attempt(CRASH, None)
    monkeypatch.setattr(runner, "_ask", noting)
    assert runner.attempt(GOOD, None).failure is None
    assert seen == [("prepare", True)]


def test_an_exception_that_left_the_process_well_does_not_cost_it(runner):
    first = measured_by(runner)
    assert runner.attempt(Candidate("raise"), None).failure is Failure.RUN_ERROR
    assert measured_by(runner) == first


@pytest.mark.parametrize("breaker", [CRASH, POISON])
def test_a_finalist_that_breaks_the_process_is_found_and_the_others_are_confirmed(runner, breaker):
    one, broken, two, wrong = runner.confirm([GOOD, breaker, OTHER, Candidate("wrong")], 4, 0)
    assert broken.failure is Failure.RUN_ERROR
    assert wrong.failure is Failure.WRONG_ANSWER
    assert len(one.samples_ms) == len(two.samples_ms) == 4
    assert one.samples_ms == two.samples_ms  # the same process: they ran together


def test_what_cannot_be_prepared_is_an_error_and_the_next_problem_is_not_harmed(runner):
    with pytest.raises(TuningError, match="out of memory"):
        runner.prepare(OP, problem(13))
    runner.prepare(OP, problem(2))
    assert runner.attempt(GOOD, None).failure is None


def test_a_closed_runner_starts_nothing_any_more(runner):
    runner.close()
    with pytest.raises(TuningError):
        runner.attempt(GOOD, None)
    with pytest.raises(TuningError):
        runner.confirm([GOOD, OTHER], 1, 0)
    assert not runner._child.alive
    assert not runner._spare.alive


def test_what_nobody_could_compile_ahead_has_more_time():
    implementations = {"slow": SimpleNamespace(external="some-package"), "as slow": SimpleNamespace(external="")}
    made = GpuRunner(3, limits=Limits(attempt_s=0.4, confirm_s=0.4, external_s=20), worker="pair_worker")
    try:
        made.prepare(SimpleNamespace(answers=None, name="toy", implementations=implementations), problem())
        assert made.attempt(Candidate("slow"), None).failure is None
        assert made.confirm([GOOD, Candidate("slow")], 3, 0)[1].failure is None
        assert made.attempt(Candidate("as slow"), None).failure is Failure.RUN_TIMEOUT
    finally:
        made.close()
