"""A recorded sweep in place of compilers and GPU: what tuning does with them is judged without either, and fast."""

from __future__ import annotations

import heapq
import random
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilebook import op as ops
from tilebook.op import Config, Op, Problem, Space, Value
from tilebook.registry import Failure, Layers
from tilebook.tuner.compile import Compiled
from tilebook.tuner.measure import SAMPLE_MS
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.session import Options, Session
from tilebook.tuner.sweep import Sweep
from tilebook.tuner.worker import FAR, Attempt, Candidate


@dataclass(frozen=True)
class Step:
    """How far a search had come: simulated seconds, configs whose compilation it had waited for, the best time then."""

    seconds: float
    tried: int
    best_ms: float


class Machine:
    """The machine that a sweep was recorded on: a compile pool and a runner that answer from it on one simulated clock.

    `workers` compile side by side, first come, first served, each for the recorded compile time; one GPU takes the
    recorded wall time for each candidate, and none before it is compiled. Preparing a problem takes no time, nor does
    the search itself. `steps` has one entry for each of our candidates that passed.
    """

    def __init__(self, sweep: Sweep, workers: int = 16) -> None:
        self.now = 0.0
        self.workers = workers
        self.steps: list[Step] = []
        self._measured = {each.candidate: each for each in sweep.measured}
        self._ours = sweep.implementation
        self._free = [0.0] * workers  # when each compiler is done with what it was given
        self._due: dict[Future[Compiled], tuple[float, Candidate, Compiled]] = {}
        self._tried: dict[Candidate, int] = {}

    # The pool

    def submit(self, op: str, implementation: str, problem_key: str, config: Mapping[str, Value]) -> Future[Compiled]:
        candidate = Candidate(implementation, Config(config))
        compiled = self._measured[candidate].compiled
        assert compiled is not None
        end = max(self.now, heapq.heappop(self._free)) + compiled.seconds
        heapq.heappush(self._free, end)
        future: Future[Compiled] = Future()
        self._due[future] = end, candidate, compiled
        return future

    def wait(self, futures: Collection[Future[Compiled]], timeout_s: float) -> set[Future[Compiled]]:
        """Those that are compiled by now; where none is, time passes until one is, whatever `timeout_s` says."""
        if not any(future.done() for future in futures):
            self.now = max(self.now, min(self._due[future][0] for future in futures))
        for future in futures:
            if not future.done() and self._due[future][0] <= self.now:
                _, candidate, compiled = self._due.pop(future)
                self._tried.setdefault(candidate, len(self._tried) + 1)
                future.set_result(compiled)
        return {future for future in futures if future.done()}

    # The runner

    def prepare(self, op: Op[Any], problem: Problem) -> None: ...

    def attempt(self, candidate: Candidate, incumbent_ms: float | None) -> Attempt:
        measured = self._measured[candidate]
        attempt = measured.attempt
        self.now += measured.run_s
        if attempt.failure is None and attempt.time_ms is not None:
            if candidate.implementation == self._ours:
                best = min(attempt.time_ms, self.steps[-1].best_ms) if self.steps else attempt.time_ms
                self.steps.append(Step(self.now, self._tried[candidate], best))
            if incumbent_ms is not None and attempt.time_ms > FAR * incumbent_ms:
                text = f"{attempt.time_ms / incumbent_ms:.1f} times slower than the best so far"
                return replace(attempt, failure=Failure.SLOW, reason=text, samples_ms=())
        return attempt

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int) -> list[list[float]]:
        """Draws from the recorded samples, which are not interleaved: close races are closer here than on a GPU."""
        draw = random.Random(seed)
        samples = [self._measured[candidate].attempt.samples_ms for candidate in candidates]
        series = [draw.choices(each, k=rounds) for each in samples]
        self.now += sum(max(SAMPLE_MS, sample) for each in series for sample in each) / 1e3
        return series

    def close(self) -> None: ...


def recorded_op(sweep: Sweep) -> Op[Any]:
    """The sweep's op, with the recorded configs as all of its feasible space and the recorded implementations."""
    real = ops.get(sweep.header["op"])
    made: Op[Any] = Op(real.name, real.problem, real.reference, real.direction)
    configs = frozenset(each.candidate.config for each in sweep.ours)
    axes = {axis: tuple(values) for axis, values in sweep.header["axes"].items()}
    known = real.tunable.space
    space = Space(
        axes=axes,
        reject=lambda problem, config, device: None if config in configs else "the sweep has not measured it",
        default=lambda problem, device: Config(sweep.header["default"]),
        work=known.work if known is not None and set(known.axes) == set(axes) else None,
    )
    for name in dict.fromkeys(each.candidate.implementation for each in sweep.measured):
        if name == sweep.implementation:
            made.implementation(name, space=space)(real.tunable.function)
        elif name in real.implementations:
            made.implementation(name)(real.implementations[name].function)
    return made


def tune(sweep: Sweep, options: Options, workers: int = 16) -> tuple[ProblemState, Machine]:
    """A whole session over the sweep, into a registry that is thrown away, and the machine with its clock and steps."""
    op, machine, run = recorded_op(sweep), Machine(sweep, workers), Run(1, True)
    problem = op.problem.from_key(sweep.header["problem"])
    with tempfile.TemporaryDirectory() as folder:
        layers = Layers([("explicit", str(Path(folder) / "registry.db"))])
        with layers.writer() as registry:
            environment = sweep.header["environment"]
            Session(sweep.device, environment, registry, layers, machine, machine, options, run).tune_all(
                [(op, problem)]
            )
    return run.done[0], machine
