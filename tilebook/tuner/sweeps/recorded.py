"""A recorded sweep in place of compilers and GPU: what tuning does with them is judged without either, and fast."""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import random
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tilebook import op as ops
from tilebook.op import Config, Op, Problem, Space, Value
from tilebook.registry import Failure, Layers, Verdict
from tilebook.registry.layers import SHIPPED
from tilebook.tuner.judge.measure import SAMPLE_MS
from tilebook.tuner.judge.stats import median
from tilebook.tuner.known import Known
from tilebook.tuner.process.compile import Compiled
from tilebook.tuner.process.runner import Attempt, Candidate
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.search import Search
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import tune_all
from tilebook.tuner.sweeps.sweep import Sweep

_T = TypeVar("_T")

LOADING_S = 4.0
"""A candidate that took this long to compile was the first of its process, and waited while Triton loaded."""

COUNTS = ("batch", "heads", "heads_kv", "rows")
"""Fields of a problem that say how often the same work is done: without them, two problems may be the same."""


@dataclass(frozen=True)
class Step:
    """A config was measured: when, in simulated seconds; which it was of those asked for; its time."""

    seconds: float
    number: int
    time_ms: float


class _Answer(Future[_T]):
    """A future that says when its result is taken."""

    def __init__(self, taken: Callable[[], None]) -> None:
        super().__init__()
        self._taken = taken

    def result(self, timeout: float | None = None) -> _T:
        self._taken()
        return super().result(timeout)


class Machine:
    """The machine that a sweep was recorded on: compilers and a runner that answer from it on one simulated clock.

    `workers` compile side by side, first come, first served, each for the recorded compile time; one GPU takes the
    recorded wall time for each candidate, and none before it is compiled. `now` is the time of whoever asks: it goes on
    when an answer is waited for. Preparing a problem takes no time, nor does the search itself, nor the start of a
    process: what was compiled first in one counts as compiled in the median time.

    `steps` has one entry for each of our candidates that passed.
    """

    def __init__(self, sweep: Sweep, workers: int = 16) -> None:
        self.now = 0.0
        self.workers = workers
        self.steps: list[Step] = []
        self._measured = {each.candidate: each for each in sweep.measured}
        self._ours = sweep.implementation
        self._usual_s = median([each.compiled.seconds for each in sweep.ours if each.compiled is not None])
        self._free = [0.0] * workers  # when each compiler is done with what it was given
        self._gpu_free = 0.0
        self._due: dict[Future[Compiled], tuple[float, Compiled]] = {}
        self._asked: dict[Candidate, int] = {}

    # The compilers

    def submit(self, op: str, implementation: str, problem_key: str, config: Mapping[str, Value]) -> Future[Compiled]:
        candidate = Candidate(implementation, Config(config))
        compiled = self._measured[candidate].compiled
        assert compiled is not None
        seconds = compiled.seconds if compiled.seconds < LOADING_S else self._usual_s
        end = max(self.now, heapq.heappop(self._free)) + seconds
        heapq.heappush(self._free, end)
        self._asked.setdefault(candidate, len(self._asked) + 1)
        future: Future[Compiled] = Future()
        self._due[future] = end, compiled
        return future

    def wait(self, futures: Collection[Future[Compiled]], timeout_s: float) -> set[Future[Compiled]]:
        """Those that are compiled by now; where none is, and there is a `timeout_s`, time passes until one is."""
        if timeout_s and not any(future.done() for future in futures):
            self.now = max(self.now, min(self._due[future][0] for future in futures))
        for future in futures:
            if not future.done() and self._due[future][0] <= self.now:
                future.set_result(self._due.pop(future)[1])
        return {future for future in futures if future.done()}

    # The runner

    def prepare(self, op: Op[Any], problem: Problem) -> None: ...

    def attempt(self, candidate: Candidate, most_ms: float | None) -> Attempt:
        measured = self._measured[candidate]
        attempt = measured.attempt
        self.now = self._gpu_free = max(self.now, self._gpu_free) + measured.run_s
        if attempt.failure is not None or attempt.time_ms is None:
            return attempt
        if candidate.implementation == self._ours:
            self.steps.append(Step(self.now, self._asked[candidate], attempt.time_ms))
        if most_ms is not None and attempt.time_ms > most_ms:
            text = f"the first estimate, {attempt.time_ms:.4g} ms, is over {most_ms:.4g} ms"
            return replace(attempt, failure=Failure.SLOW, reason=text, samples_ms=())
        return attempt

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        """Draws from the recorded samples, which were not interleaved; the second time, `fresh`, other ones."""
        draw = random.Random(2 * seed + fresh)
        samples = [draw.choices(self._measured[each].attempt.samples_ms, k=rounds) for each in candidates]
        self.now += sum(max(SAMPLE_MS, sample) for series in samples for sample in series) / 1e3
        return [Attempt(None, "", median(series), tuple(series)) for series in samples]

    def close(self) -> None: ...


class Lane(Executor):
    """The thread in front of the machine's GPU: an answer is there at once, and its time passes when it is taken."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def submit(self, ask: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        machine, asked_at = self._machine, self._machine.now
        answer = ask(*args, **kwargs)
        end, machine.now = machine.now, asked_at

        def taken() -> None:
            machine.now = max(machine.now, end)

        future = _Answer[_T](taken)
        future.set_result(answer)
        return future


def todays_default(sweep: Sweep) -> Config | None:
    """What the space behind the sweep says now; None where there is no such implementation any more."""
    op = ops.get(sweep.header["op"])
    implementation = op.implementations.get(sweep.implementation)
    if implementation is None or implementation.space is None:
        return None
    return implementation.space.default(op.problem.from_key(sweep.header["problem"]), sweep.device)


def default(sweep: Sweep) -> Config:
    """What a session over the sweep starts from: today's default for its problem, where that was measured and passed;
    else the default of the day that it was recorded."""
    today = todays_default(sweep)
    passed = any(each.candidate.config == today and each.attempt.failure is None for each in sweep.ours)
    return today if today is not None and passed else Config(sweep.header["default"])


def recorded_op(sweep: Sweep) -> Op[Any]:
    """The sweep's op, with the recorded configs as all of its feasible space and the recorded implementations."""
    real = ops.get(sweep.header["op"])
    made: Op[Any] = Op(real.name, real.problem, real.reference, real.direction)
    configs = frozenset(each.candidate.config for each in sweep.ours)
    axes = {axis: tuple(values) for axis, values in sweep.header["axes"].items()}
    known = real.tunable.space
    later = known.later if known is not None else {}
    space = Space(
        axes=axes,
        reject=lambda problem, config, device: None if config in configs else "the sweep has not measured it",
        default=lambda problem, device: default(sweep),
        work=known.work
        if known is not None and axes.keys() <= known.axes.keys() <= axes.keys() | later.keys()
        else None,
        later={axis: later[axis] for axis in later if axis in axes},
    )
    for name in dict.fromkeys(each.candidate.implementation for each in sweep.measured):
        if name == sweep.implementation:
            made.implementation(name, space=space)(real.tunable.function)
        elif name in real.implementations:
            made.implementation(name)(real.implementations[name].function)
    return made


def neighbours(sweep: Sweep, shipped: Path = SHIPPED) -> list[Verdict]:
    """The verdicts of the registry that comes with the package which a tune of the sweep's problem may learn from when
    it is judged: none of the problem itself, nor of one that differs from it only in `COUNTS`."""
    problem_of = ops.get(sweep.header["op"]).problem.from_key
    own = sweep.header["problem"]

    def kind(key: str) -> dict[str, Value]:
        return {name: value for name, value in json.loads(key).items() if name not in COUNTS}

    verdicts = Layers([("shipped", str(shipped))]).verdicts(op=sweep.header["op"])
    found = [each for _, each in verdicts if kind(each.problem) != kind(own)]
    return [each for each in found if problem_of(own).distance(problem_of(each.problem)) < math.inf]


@contextlib.contextmanager
def _known(sweep: Sweep, verdicts: Iterable[Verdict]) -> Iterator[Known]:
    """A registry with these verdicts, which is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        layers = Layers([("explicit", str(Path(folder) / "registry.db"))])
        with layers.writer() as registry:
            registry.merge(verdicts=verdicts)
            yield Known(registry, layers, sweep.device, sweep.header["environment"], "graph")


def beginning(sweep: Sweep, verdicts: Iterable[Verdict] = ()) -> tuple[Config, ...]:
    """The configs that a session over the sweep tries first: the default, and what it learns from these verdicts."""
    op = recorded_op(sweep)
    problem = op.problem.from_key(sweep.header["problem"])
    with _known(sweep, verdicts) as known:
        field = known.field(op.tunable, problem, sweep.device)
        return Search(field.space, field.feasible, [default(sweep), *known.seeds(op, problem, field)]).seeds


def tune(
    sweep: Sweep, options: Options, workers: int = 16, verdicts: Iterable[Verdict] = ()
) -> tuple[ProblemState, Machine]:
    """A whole session over the sweep, and the machine with its clock and steps. It goes into a registry that is thrown
    away, and knows nothing but these verdicts."""
    op, machine, run = recorded_op(sweep), Machine(sweep, workers), Run(1, True)
    problem = op.problem.from_key(sweep.header["problem"])
    with _known(sweep, verdicts) as known:
        session = Session(sweep.device, known, machine, machine, options, run, lane=Lane(machine))
        (state,) = tune_all([session], [(op, problem)], run)
    return state, machine
