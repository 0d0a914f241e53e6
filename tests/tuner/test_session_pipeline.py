"""Compilers and GPU work side by side: neither preparing nor asking, telling or storing keeps the GPU waiting."""

import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from fakes import FakePool, FakeRunner, tune
from test_session import valley
from test_session_implementations import times, two

from tilebook.registry import Failure


class SlowPool(FakePool):
    """Compiles in threads, each candidate for a moment."""

    workers = 4

    def __init__(self, seconds: float, **how) -> None:
        super().__init__(**how)
        self._seconds, self._threads = seconds, ThreadPoolExecutor(self.workers)
        self.finished = 0

    def submit(self, *asked):
        compiled = super().submit(*asked).result()

        def work():
            time.sleep(self._seconds)
            self.finished += 1
            return compiled

        return self._threads.submit(work)

    def wait(self, futures, timeout_s):
        return wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED).done


class SlowRunner(FakeRunner):
    def __init__(self, seconds: float, time_ms=valley) -> None:
        super().__init__(time_ms)
        self._seconds, self.at_a_time, self._inside = seconds, 0, 0
        self._lock = threading.Lock()

    def attempt(self, candidate, most_ms):
        with self._lock:
            self._inside += 1
            self.at_a_time = max(self.at_a_time, self._inside)
        time.sleep(self._seconds)
        self._inside -= 1
        return super().attempt(candidate, most_ms)


def test_the_gpu_is_busy_while_candidates_are_compiled_asked_for_and_stored(tmp_path):
    runner, pool = SlowRunner(0.04), SlowPool(0.04)
    states, registry = tune(tmp_path / "registry.db", runner, pool, trials=40)
    assert states[0].busy > 0.7
    assert registry.verdicts()[0].notes["busy"] == round(states[0].busy, 3)
    assert runner.at_a_time == 1


def test_the_first_candidates_are_compiled_before_the_gpu_is_prepared(tmp_path):
    pool = FakePool()
    submitted = []

    class Preparing(FakeRunner):
        def prepare(self, op, problem):
            submitted.append(len(pool.submitted))

    tune(tmp_path / "registry.db", Preparing(valley), pool)
    assert submitted[0] >= pool.workers


def test_what_is_compiled_of_the_next_space_is_measured_while_the_first_one_s_compile(tmp_path):
    class Uneven(SlowPool):
        """Takes long for the small space, which comes first."""

        def submit(self, op, implementation, problem, config):
            self._seconds = 0.4 if implementation == "other" else 0.0
            return super().submit(op, implementation, problem, config)

    axes = {"TILE": (1, 2, 4), "num_warps": (1,)}
    op, runner = two(axes=axes), SlowRunner(0.01, times)
    tune(tmp_path / "registry.db", runner, Uneven(0.0), op=op, trials=30)
    order = [candidate.implementation for candidate in runner.attempted]
    assert order.count("other") == 3
    assert 0 < order.index("triton") < len(order) - 1 - order[::-1].index("other")
    assert runner.at_a_time == 1


def test_what_compiles_on_the_gpu_s_time_does_not_fill_in(tmp_path):
    op, runner = two(external="numpy"), SlowRunner(0.0, times)
    tune(tmp_path / "registry.db", runner, SlowPool(0.1), op=op, trials=16)
    order = [candidate.implementation for candidate in runner.attempted]
    assert order.index("other") == len(order) - order[::-1].index("triton")


def test_every_config_is_compiled_once_and_judged(tmp_path):
    pool = SlowPool(0.0)
    states, _ = tune(tmp_path / "registry.db", SlowRunner(0.0), pool)
    assert pool.finished == len(pool.submitted) == len(set(pool.submitted)) == states[0].compiled


def test_what_compiles_to_the_code_of_a_candidate_in_flight_shares_its_time(tmp_path):
    runner = SlowRunner(0.005)
    states, registry = tune(tmp_path / "registry.db", runner, FakePool(code=lambda c: str(c["BLOCK"])))
    measured = [c.config["BLOCK"] for c in runner.attempted if c.implementation == "triton"]
    assert len(measured) == len(set(measured))
    twins = [trial for trial in registry.trials() if trial.failure is Failure.DUPLICATE_BINARY]
    assert len(twins) == states[0].rejected[Failure.DUPLICATE_BINARY] > 10
