"""A compiler and a GPU that answer from a formula, for tests of the session."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from toy import make_op

from tilebook import device as devices
from tilebook.op import Config
from tilebook.registry import Failure, Layers, Registry, Trial, Verdict
from tilebook.tuner.known import PREDICTED, Known
from tilebook.tuner.process.compile import Binary, Compiled
from tilebook.tuner.process.runner import Attempt, Candidate
from tilebook.tuner.progress import Run
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import tune_all

GPU = devices.find("H200")
ENVIRONMENT = {"triton": "3.6.0", "torch": "2.11.0"}


class FakePool:
    """Compiles at once; `twins` maps configs to the key of the code they share, `broken` to a failure."""

    workers = 2

    def __init__(self, broken: Callable[[Config], str | None] = lambda c: None, code=lambda c: c.key) -> None:
        self.broken, self.code, self.submitted = broken, code, []

    def submit(self, op, implementation, problem, config):
        config = Config(config)
        self.submitted.append(config)
        future: Future[Compiled] = Future()
        binary = Binary("k", self.code(config), 64, 1024, 64, 0, 4, 1)
        failure = self.broken(config)
        future.set_result(Compiled((binary,), 0.01, failure, failure or ""))
        return future

    def wait(self, futures, timeout_s):
        return set(futures)


class FakeRunner:
    """Times by `time_ms(candidate)` with multiplicative noise; a returned Failure stands for one. `unsound` holds
    candidates that pass at first, and fail when they are confirmed."""

    def __init__(self, time_ms: Callable[[Candidate], float | Failure], noise: float = 0.003, seed: int = 0) -> None:
        self._time_ms, self._noise, self._random = time_ms, noise, random.Random(seed)
        self.attempted: list[Candidate] = []
        self.confirmed: list[tuple[tuple[Candidate, ...], bool]] = []
        self.unsound: dict[Candidate, Failure] = {}

    def prepare(self, op, problem) -> None: ...

    def _sample(self, candidate: Candidate) -> float:
        value = self._time_ms(candidate)
        assert isinstance(value, float)
        return value * self._random.lognormvariate(0, self._noise)

    def attempt(self, candidate, most_ms):
        self.attempted.append(candidate)
        value = self._time_ms(candidate)
        if isinstance(value, Failure):
            return Attempt(value, f"injected {value}")
        samples = tuple(self._sample(candidate) for _ in range(15))
        return Attempt(None, "", sorted(samples)[7], samples)

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False):
        self.confirmed.append((tuple(candidates), fresh))
        return [self._confirmed(candidate, rounds) for candidate in candidates]

    def _confirmed(self, candidate: Candidate, rounds: int) -> Attempt:
        if candidate in self.unsound:
            return Attempt(self.unsound[candidate], "found late")
        samples = tuple(self._sample(candidate) for _ in range(rounds))
        return Attempt(None, "", sorted(samples)[rounds // 2], samples)

    def close(self) -> None: ...


class Clock:
    """Time that passes where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedRunner(FakeRunner):
    """As slow as a GPU, by a simulated clock.

    costs: seconds for "prepare", "attempt" (or an implementation's name), "truths", which a process makes once before
    it confirms, and "verify", for each finalist that it has not verified before.
    """

    def __init__(self, clock: Clock, time_ms: Callable[[Candidate], float | Failure], **costs: float) -> None:
        super().__init__(time_ms)
        self.clock = clock
        self.costs = {"prepare": 2.0, "attempt": 0.2, "truths": 2.0, "verify": 0.5, **costs}
        self.problems: list[str] = []
        self._proven: set[Candidate | str] = set()

    def prepare(self, op, problem):
        self.problems.append(problem.label)
        self._proven = set()
        self.clock.now += self.costs["prepare"]

    def attempt(self, candidate, most_ms):
        self.clock.now += self.costs.get(candidate.implementation, self.costs["attempt"])
        return super().attempt(candidate, most_ms)

    def confirm(self, candidates, rounds, seed, *, fresh=False):
        if fresh:
            self._proven = set()
            self.clock.now += self.costs["prepare"]
        todo = {"truths", *candidates} - self._proven
        self.clock.now += sum(self.costs["truths" if each == "truths" else "verify"] for each in todo)
        self._proven |= todo
        attempts = super().confirm(candidates, rounds, seed, fresh=fresh)
        self.clock.now += rounds * sum(attempt.time_ms or 0.0 for attempt in attempts) / 1e3
        return attempts


class Memory:
    """As much of a registry as a session uses, without a disk."""

    def __init__(self) -> None:
        self._trials: list[Trial] = []
        self._verdict: Verdict | None = None

    def record(self, trials=(), verdict=None) -> None:
        self._trials.extend(trials)
        self._verdict = verdict or self._verdict

    def trials(self, **_: object) -> list[Trial]:
        return self._trials

    def verdicts(self, **_: object) -> list[Verdict]:
        return [self._verdict] if self._verdict else []


def tune_in_memory(op, runner, **options) -> Verdict:
    """Tunes one toy problem and returns the verdict."""
    memory, run = Memory(), Run(1, True)
    known = Known(memory, Layers([]), GPU, ENVIRONMENT, "graph")
    session = Session(GPU, known, FakePool(), runner, Options(**options), run)
    (state,) = tune_all([session], [(op, op.problem(64, 64))], run)
    assert state.verdict is not None, state.error
    return state.verdict


def tune(path, runner, pool=None, problems=None, op=None, run=None, mode="graph", weights=None, **options):
    """Tunes toy problems into the registry at `path`, on the GPU behind `runner` or behind each of a list of them;
    returns (states, registry opened for reading)."""
    op = op or make_op()
    problems = problems or [op.problem(64, 64)]
    layers = Layers([("explicit", str(path))])
    runners = runner if isinstance(runner, list) else [runner]
    run = run or Run(len(problems), runner is not None, gpus=len(runners))
    with layers.writer() as registry:
        known = Known(registry, layers, GPU, ENVIRONMENT, PREDICTED if runner is None else mode)
        sessions = [
            Session(GPU, known, pool or FakePool(), each, Options(**options), run, index)
            for index, each in enumerate(runners)
        ]
        states = tune_all(sessions, [(op, problem) for problem in problems], run, weights)
    return states, Registry.open(path)
