"""Several GPUs of one host share the problems, the compilers and the registry."""

import threading
import time

import pytest
from fakes import FakePool, FakeRunner, tune
from test_session import BEST, valley
from toy import Scaling

from tilebook.errors import TuningError
from tilebook.op import Config
from tilebook.registry import Registry
from tilebook.tuner.progress import Run

PROBLEMS = [Scaling(64 << n, 64) for n in range(6)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


class Gpu(FakeRunner):
    """Remembers what it was given. A broken one is prepared for nothing; `stops` is what it raises at its first try."""

    def __init__(self, broken=lambda problem: False, stops=None, together=None) -> None:
        super().__init__(valley)
        self.problems, self.broken, self.stops, self.together, self.closed = [], broken, stops, together, False

    def prepare(self, op, problem):
        self.problems.append(problem)
        if self.together is not None and len(self.problems) == 1:
            self.together.wait(20)
        if self.broken(problem):
            raise TuningError("no CUDA-capable device is detected")

    def attempt(self, candidate, most_ms):
        if self.stops is not None:
            raise self.stops
        time.sleep(0.001)
        return super().attempt(candidate, most_ms)

    def close(self):
        self.closed = True


def test_every_problem_is_tuned_once_by_one_gpu_and_all_gpus_work_side_by_side(path):
    together = threading.Barrier(3)
    gpus = [Gpu(together=together) for _ in range(3)]
    pool = FakePool()
    states, registry = tune(path, gpus, pool, PROBLEMS, trials=8)
    given = [problem for gpu in gpus for problem in gpu.problems]
    assert sorted(given, key=lambda p: p.rows) == PROBLEMS
    assert [state.label for state in states] == [problem.label for problem in PROBLEMS]
    assert {state.gpu for state in states} == {0, 1, 2}
    assert len(registry.verdicts()) == len(PROBLEMS)
    assert {len(registry.trials(problem=problem.key)) for problem in PROBLEMS} == {s.tried for s in states}
    assert all(gpu.closed for gpu in gpus)


def test_what_fails_on_a_broken_gpu_is_done_by_another(path):
    gpus = [Gpu(broken=lambda problem: True), Gpu()]
    run = Run(len(PROBLEMS), True, gpus=2)
    states, registry = tune(path, gpus, problems=PROBLEMS, run=run, trials=8)
    assert not any(state.error for state in states)
    assert len(run.done) == len(PROBLEMS)
    assert run.now == []
    assert {state.gpu for state in states} == {1}
    assert len(registry.verdicts()) == len(PROBLEMS)


def test_a_problem_that_fails_everywhere_is_an_error_and_the_others_are_tuned(path):
    bad = PROBLEMS[2]
    gpus = [Gpu(broken=lambda problem: problem == bad) for _ in range(2)]
    states, registry = tune(path, gpus, problems=PROBLEMS, trials=8)
    assert [state.label for state in states if state.error] == [bad.label]
    assert all(bad in gpu.problems for gpu in gpus)
    assert len(registry.verdicts()) == len(PROBLEMS) - 1


def test_an_interrupt_ends_all_gpus_and_no_candidate_is_blamed_for_it(path):
    gpus = [Gpu(stops=KeyboardInterrupt()), Gpu(), Gpu()]
    with pytest.raises(KeyboardInterrupt):
        tune(path, gpus, problems=PROBLEMS)
    assert all(gpu.closed for gpu in gpus)
    with Registry.open(path) as registry:
        assert not [trial for trial in registry.trials() if trial.failure is not None]


def test_winners_found_on_one_gpu_serve_another_as_seeds(path):
    tune(path, [Gpu(), Gpu()], problems=PROBLEMS[:2])
    runner = FakeRunner(valley)
    tune(path, runner, problems=[PROBLEMS[3]])
    assert [c.config for c in runner.attempted if c.implementation == "triton"][1] == BEST
    with Registry.open(path) as registry:
        assert {Config(v.config) for v in registry.verdicts()} == {BEST}
