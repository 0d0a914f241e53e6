"""Several GPUs of one host share the problems, the compilers and the registry."""

import contextlib
import threading
import time

import pytest
from fakes import ENVIRONMENT, GPU, FakePool, FakeRunner, tune
from test_session import BEST, valley
from toy import Scaling, make_op

from tilebook.errors import GpuLost, TuningError
from tilebook.op import Config
from tilebook.registry import Layers, Registry
from tilebook.tuner.known import Known
from tilebook.tuner.progress import Run
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import Shards

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


class Losing(Gpu):
    """Its machine is gone after so many candidates, each time that this problem is tuned on it."""

    def __init__(self, problem, after=6) -> None:
        super().__init__()
        self.problem, self.after = problem, after

    def attempt(self, candidate, most_ms):
        if self.problems[-1] == self.problem and len(self.attempted) >= self.after:
            raise GpuLost("its machine is gone")
        return super().attempt(candidate, most_ms)


def shards_of(path, gpus, problems, run, trials=16):
    """What `tune_all` makes, for GPUs that come one after the other and stay until they are lost."""
    op, layers = make_op(), Layers([("explicit", str(path))])
    with layers.writer() as registry:
        known, shards = Known(registry, layers, GPU, ENVIRONMENT, "graph"), None
        for index, gpu in enumerate(gpus):
            session = Session(GPU, known, FakePool(), gpu, Options(trials=trials), run, index, where=f"host {index}")
            shards = shards or Shards([(op, problem) for problem in problems], session, run)
            shards.join(session)
            with contextlib.suppress(GpuLost):
                shards.serve(session)
            session.close()
        shards.finish("no GPU is left")
    return shards.states


def test_a_gpu_that_comes_goes_on_with_what_a_lost_one_had_under_way_from_its_trials(path):
    gpus, run = [Losing(PROBLEMS[1], after=30), Gpu()], Run(3, True, gpus=2)
    states = shards_of(path, gpus, PROBLEMS[:3], run)
    assert [state.where for state in states] == ["host 0", "host 1", "host 1"]
    assert gpus[1].problems == PROBLEMS[1:3]
    assert states[1].reused > 0
    with Registry.open(path) as registry:
        tried = [Config(trial.config) for trial in registry.trials(problem=PROBLEMS[1].key) if trial.config]
    assert len(tried) == len(set(tried))
    assert [state.label for state in run.done] == [problem.label for problem in PROBLEMS[:3]]
    assert run.now == []


def test_a_problem_on_which_three_gpus_are_lost_is_an_error_and_the_others_are_tuned(path):
    gpus, run = [*(Losing(PROBLEMS[0]) for _ in range(3)), Gpu()], Run(3, True, gpus=2)
    states = shards_of(path, gpus, PROBLEMS[:3], run)
    assert states[0].error == "3 GPUs were lost while it was tuned on them: its machine is gone"
    assert all(state.verdict is not None for state in states[1:])
    assert run.now == []


def test_what_no_gpu_is_left_for_is_named_and_its_trials_are_kept(path):
    states = shards_of(path, [Losing(PROBLEMS[0])], PROBLEMS[:2], Run(2, True, gpus=2))
    assert [state.unreached for state in states] == ["no GPU is left", "no GPU is left"]
    with Registry.open(path) as registry:
        assert registry.trials(problem=PROBLEMS[0].key)
