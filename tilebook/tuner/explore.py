"""The search of one problem as a pipeline: ask → compile → measure → tell, so that compilers and GPU work side by side.

Candidates are compiled ahead of the GPU, and a second one waits in front of it while the first is measured: telling the
search, storing the trial and asking for more happen meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace

from tilebook.op import Config
from tilebook.registry import Failure, Json, Trial
from tilebook.tuner.budget import Turn
from tilebook.tuner.model import predict
from tilebook.tuner.process.compile import Compiled, Compilers, outcome
from tilebook.tuner.process.runner import Attempt, Candidate, Runner
from tilebook.tuner.tuning import Ending, Entrant, Searched, Tuning

GAIN = 0.99
"""What does not lower the best time below this share of it has gained nothing."""

PATIENCE = 48
"""So many candidates without a gain end the search …"""

_POLISH = 32  # … and after so many the neighbourhood of the best is compiled, to be there when it does

FAR = 2.0
"""A candidate whose first estimate is so many times the best time so far is not sampled."""

AHEAD = 2
"""Candidates given to the GPU at a time: the one it measures, and the next."""


def timed_attempt(
    runner: Runner, candidate: Candidate, most_ms: float | None, clock: Callable[[], float]
) -> tuple[Attempt, float]:
    """The attempt, with the seconds that it took."""
    began = clock()
    attempt = runner.attempt(candidate, most_ms)
    return attempt, clock() - began


class Stopped(Exception):
    """The run ends, from another thread; what is under way must not be judged."""


@dataclass(frozen=True)
class Bounds:
    """limit: candidates, before the neighbourhood of the best. width: candidates compiling, or compiled and waiting.

    patience: candidates without a gain. turn: the problem's part of the run's time.
    """

    limit: int
    width: int
    patience: int
    turn: Turn


class Explorer:
    """Explores one implementation's space. gpu: the one thread that talks to the runner; no runner means predicting."""

    def __init__(
        self, tuning: Tuning, entrant: Entrant, pool: Compilers, runner: Runner | None, gpu: Executor, bounds: Bounds
    ) -> None:
        self._tuning, self._entrant, self._search = tuning, entrant, entrant.search
        self._pool, self._runner, self._gpu, self._bounds = pool, runner, gpu, bounds
        self._clock, self._part = bounds.turn.now, f"try {entrant.name}"
        self._compiling: dict[Future[Compiled], Config] = {}
        self._measuring: deque[tuple[Config, Compiled, Future[tuple[Attempt, float]]]] = deque()
        self._twins_of: dict[Config, list[tuple[Config, Compiled]]] = {}  # same code as one that is being measured
        self._asked = 0
        self._gainless = 0
        self._best_ms = float("inf")
        self._patient = True
        self._deadline = float("inf")
        self._ended = False
        self._following: Explorer | None = None
        self._begun: Explorer | None = None
        self._centre: tuple[Config, float] | None = None
        self.stopped = False

    def reuse(self, trials: dict[Config, Trial], settled: bool) -> None:
        """Begins where the run that left these trials ended; `settled` says that it was this same search."""
        for config, trial in trials.items():
            self._search.tell(config, self._tuning.reuse(self._entrant, config, trial))
            self._asked += 1
            self._count()
        if not settled:
            self._gainless, self._patient = 0, True

    @property
    def effort(self) -> tuple[bool, int]:
        """Orders what is to be explored: large spaces after small ones, and last what compiles on the GPU's time."""
        return self._entrant.implementation.external != "", len(self._entrant.feasible)

    def begin(self) -> None:
        """Starts compiling, so that there is something to measure once the GPU's process is ready."""
        self._submit()

    def step(self) -> bool:
        """Measures a candidate if one is compiled, and says whether it did."""
        self._feed()
        if self._measuring:
            self._finish_one()
            return True
        return False

    def run(self, deadline: float, following: Explorer | None = None) -> None:
        """Explores until the limit, the deadline, or no more gain; then the neighbourhood of the best until it is.

        following: begins once this one has little left to compile, and measures wherever the GPU would wait for that.
        """
        state, self._deadline, self._following = self._tuning.state, deadline, following
        began, measured = self._clock(), state.measuring_s
        alone = len(self._tuning.entrants) == 1
        self._tuning.phase("searching" if alone else f"searching {self._entrant.name}")
        try:
            while not self._late:
                self._submit()
                self._feed()
                if self._measuring:
                    self._finish_one()
                elif self._compiling:
                    self._wait()
                else:
                    self._ended = True
                    break
            while self._measuring:
                self._finish_one()
        finally:
            if self._runner is not None:
                state.waiting_s += max(0.0, self._clock() - began - (state.measuring_s - measured))
            self._tuning.searches[self._entrant.name] = Searched(self._asked, self.ending)

    def close(self) -> None:
        """Gives up what is compiling, and waits until the GPU's thread is free for the next problem."""
        for future in self._compiling:
            future.cancel()
        wait([future for _, _, future in self._measuring if not future.cancel()])

    @property
    def ending(self) -> Ending:
        """What ended the search."""
        if not self._ended:
            return "budget"
        if not self._patient:
            return "converged"
        return "all" if self._search.exhausted else "trials"

    @property
    def _late(self) -> bool:
        """Is there no time for another candidate? For our own default there is: nothing can be decided without it."""
        now = self._clock()
        if now + (len(self._measuring) + 1) * self._bounds.turn.expected(self._part) <= self._deadline:
            return False
        return self._entrant is not self._tuning.entrants[0] or self._search.told(self._entrant.default)

    # Asking and compiling

    def _submit(self) -> None:
        """Keeps the compilers ahead of the GPU."""
        for config in self._wanted():
            self._compiling[self._compile(config)] = config
        if self._over and self._following is not None:
            self._following.begin()
            if not self._following._entrant.implementation.external:  # that compiles where it should only fill in
                self._begun = self._following
            self._following = None

    def _compile(self, config: Config) -> Future[Compiled]:
        if self._entrant.implementation.external:  # its own package will, in the GPU's process
            nothing: Future[Compiled] = Future()
            nothing.set_result(Compiled())
            return nothing
        return self._pool.submit(self._tuning.op.name, self._entrant.name, self._tuning.problem.key, config)

    def _wanted(self) -> list[Config]:
        search, best, centre = self._search, self._search.best, self._centre
        open_ = len(self._compiling) + len(self._measuring)
        if self._runner is not None and best is not None and (centre is None or best[0] != centre[0]):
            soon = self._gainless >= _POLISH and (centre is None or best[1] < GAIN * centre[1])
            if soon or (not open_ and self._over):
                self._centre = best
                near = search.polish(best[0])
                self._tuning.state.limit = max(self._tuning.state.limit, self._tuning.state.tried + open_ + len(near))
                return near
        if self._over:
            return []
        asked = search.ask(min(self._bounds.width - open_, self._bounds.limit - self._asked))
        self._asked += len(asked)
        return asked

    @property
    def _over(self) -> bool:
        """Has the search asked for all that it will?"""
        return not self._patient or self._asked >= self._bounds.limit or self._search.exhausted

    def _compiled(self) -> tuple[Config, Compiled] | None:
        """The next compilation that is done, in the order of asking, so that a run with the same seed takes the same
        steps wherever it can."""
        self._check()
        done = self._pool.wait(self._compiling, timeout_s=0.0) if self._compiling else ()
        for future in self._compiling:
            if future in done:
                return self._compiling.pop(future), outcome(future)
        return None

    def _wait(self) -> None:
        """Until something of this space is compiled; what is of the following one may have the GPU meanwhile."""
        following = self._begun
        if following is None or not following.step():
            self._pool.wait([*self._compiling, *(following._compiling if following else ())], timeout_s=0.5)
            self._tuning.run.changed()

    # Measuring and telling

    def _feed(self) -> None:
        """Hands compiled candidates to the GPU; those that need none are judged on the way."""
        while len(self._measuring) < AHEAD and not self._late:
            ready = self._compiled()
            if ready is None:
                return
            config, compiled = ready
            self._tuning.state.compiled += not self._entrant.implementation.external
            self._tuning.state.compiling_s += compiled.seconds
            if self._runner is None and not (compiled.failure or compiled.binaries):
                compiled = replace(compiled, failure=Failure.COMPILE_ERROR.value)
            if compiled.failure is not None:
                self._judge(config, compiled, Attempt(Failure(compiled.failure), compiled.reason), ran=False)
            elif (twin := self._twin(config, compiled)) != config:
                if any(each[0] == twin for each in self._measuring):
                    self._twins_of.setdefault(twin, []).append((config, compiled))
                else:
                    self._judge_twin(config, compiled, twin)
            elif self._runner is None:
                self._predict(config, compiled)
            else:
                candidate, best = self._entrant.candidate(config), self._search.best
                self._tuning.compiled[candidate] = compiled
                # Its own best: however far behind, its best few are what serves where the winner cannot run.
                most_ms = None if config == self._entrant.default or best is None else FAR * best[1]
                future = self._gpu.submit(timed_attempt, self._runner, candidate, most_ms, self._clock)
                self._measuring.append((config, compiled, future))
            self._submit()

    def _finish_one(self) -> None:
        config, compiled, future = self._measuring[0]
        while not future.done():
            wait([future], timeout=0.5)
            self._check()
            self._tuning.run.changed()
        self._check()
        attempt, seconds = future.result()
        self._measuring.popleft()
        self._tuning.state.measuring_s += seconds
        self._bounds.turn.note(self._part, seconds)
        self._judge(config, compiled, attempt)
        for twin, code in self._twins_of.pop(config, ()):
            self._judge_twin(twin, code, config)

    def _twin(self, config: Config, compiled: Compiled) -> Config:
        """The config that stands for all with this machine code; where there is none to compare, each for itself."""
        return self._entrant.twins.setdefault(compiled.fingerprint, config) if compiled.binaries else config

    def _judge(self, config: Config, compiled: Compiled, attempt: Attempt, ran: bool = True) -> None:
        self._search.tell(config, attempt.time_ms)
        self._record(config, compiled, attempt, ran=ran)

    def _judge_twin(self, config: Config, compiled: Compiled, twin: Config) -> None:
        self._search.tell(config, self._tuning.times.get(self._entrant.candidate(twin)))
        self._record(config, compiled, Attempt(Failure.DUPLICATE_BINARY, f"the same machine code as {twin}"), ran=False)

    def _predict(self, config: Config, compiled: Compiled) -> None:
        tuning, candidate, work = self._tuning, self._entrant.candidate(config), self._entrant.space.work
        tuning.compiled[candidate] = compiled
        cost = work(tuning.problem, config) if work else None
        prediction = predict(tuning.problem.cost(), cost, compiled, tuning.gpu)
        self._search.tell(config, prediction.time_ms)
        tuning.note(candidate, prediction.time_ms)
        facts: dict[str, Json] = {"predicted_ms": prediction.time_ms, "bound": prediction.bound}
        self._record(config, compiled, Attempt(facts={**facts, "occupancy": prediction.occupancy}))

    def _record(self, config: Config, compiled: Compiled, attempt: Attempt, ran: bool = True) -> None:
        self._count()
        facts: dict[str, Json] = {} if self._entrant.implementation.external else {"compiled": compiled.to_json()}
        self._tuning.record(self._entrant.candidate(config), attempt, facts, ran)

    def _count(self) -> None:
        """Counts the candidates since the last gain."""
        self._gainless += 1
        best = self._search.best
        if best is not None and best[1] < GAIN * self._best_ms:
            self._best_ms, self._gainless = best[1], 0
        if self._gainless >= self._bounds.patience:
            self._patient = False

    def _check(self) -> None:
        if self.stopped:
            raise Stopped
