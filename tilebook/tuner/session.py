"""Tunes problems on one GPU, or for one that is not here: enumerate → compile → verify → time → confirm → store."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tilebook.device import Device
from tilebook.op import Config, Cost, Op, Problem, Space
from tilebook.registry import Verdict
from tilebook.tuner import decide
from tilebook.tuner.compile import Compilers
from tilebook.tuner.explore import AHEAD, Bounds, Explorer, Stopped, timed_attempt
from tilebook.tuner.known import Known, unsearched
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.runner import Candidate, Runner
from tilebook.tuner.search import Search
from tilebook.tuner.tuning import Tuning


@dataclass(frozen=True)
class Options:
    """How long and how to search. `trials` limits the candidates of one problem; None means all that are worth it."""

    trials: int | None = None
    seed: int = 0
    method: str = "tpe"
    rounds: int = 30
    force: bool = False


class Session:
    """Tunes one problem after the other on the GPU behind `runner`, number `index` of this host. Without a runner it
    predicts instead of measuring."""

    def __init__(
        self,
        gpu: Device,
        known: Known,
        pool: Compilers,
        runner: Runner | None,
        options: Options,
        run: Run,
        index: int = 0,
        lane: Executor | None = None,
    ) -> None:
        """lane: what the runner's requests run in, one after the other; a thread where none is given."""
        self.index = index
        self._gpu, self._known, self._pool, self._runner = gpu, known, pool, runner
        self._options, self._run = options, run
        # As few as keep compilers and GPU busy: what is under way was proposed without knowing of one another.
        self._width = max(4, pool.workers // run.gpus + AHEAD)
        self._lane = lane or ThreadPoolExecutor(1, f"tilebook-gpu-{index}")
        self._explorer: Explorer | None = None
        self._closed = False

    def close(self) -> None:
        """Ends what is under way, from any thread: a problem being tuned raises Stopped, and its trials stay."""
        self._closed = True
        if self._explorer is not None:
            self._explorer.stopped = True
        self._lane.shutdown(wait=False, cancel_futures=True)
        if self._runner is not None:
            self._runner.close()

    def tune(self, op: Op[Any], problem: Problem, deadline: float | None = None) -> ProblemState:
        """Tunes one problem until `deadline` (of the monotonic clock), and stores its trials and its verdict.

        What goes wrong with the problem or the GPU is the state's `error`. The caller ends the state's part in the run.
        """
        space = op.tunable.space
        assert space is not None
        runnable = space.feasible(problem, self._gpu)
        feasible = [config for config in runnable if not self._known.revoked(op, op.tunable.name, config)]
        limit = min(len(feasible), self._options.trials or len(feasible))
        state = ProblemState(op.name, problem.label, len(feasible), len(space) - len(runnable), limit, self.index)
        state.revoked = len(runnable) - len(feasible)
        self._run.begin(state)
        try:
            standing = None if self._options.force else self._known.standing(op, problem, feasible)
            new = None if standing is None else unsearched(standing, space, feasible)
            if standing is not None and new is None:
                state.verdict, state.skipped = standing, True
            else:
                state.verdict = self._tune(op, problem, space, feasible, standing, new, state, deadline)
                self._known.record((), state.verdict)
        except RuntimeError as broken:
            if self._closed:
                raise Stopped from broken
            state.error = str(broken)
            if self._explorer is not None:
                self._explorer.close()
        return state

    def _tune(
        self,
        op: Op[Any],
        problem: Problem,
        space: Space,
        feasible: Sequence[Config],
        standing: Verdict | None,
        new: Sequence[Config] | None,
        state: ProblemState,
        deadline: float | None,
    ) -> Verdict:
        """standing, new: the verdict over a smaller space, and the configs that it did not know."""
        # A revoked default is replaced as dispatch replaces it, so that the comparison is with what would run.
        stand_ins = (c for c in space.defaults(problem, self._gpu) if not self._known.revoked(op, op.tunable.name, c))
        if (first := next(stand_ins, None)) is None:
            raise RuntimeError(f"every config of {op.tunable.name} is revoked")
        default = Candidate(op.tunable.name, first)
        winner = Candidate(standing.implementation, Config(standing.config)) if standing is not None else None
        trials = {} if self._options.force else self._known.trials(op, problem, feasible)
        if default.config in trials and trials[default.config].failure is not None:
            del trials[default.config]  # nothing can be decided without it, so it gets another chance
        seeds = [default.config, *([winner.config] if winner else []), *self._known.seeds(op, problem)]
        candidates = self._by_roofline(space, problem, feasible)
        if new is not None:
            wanted = {*new, *trials, *seeds[:2]}
            candidates = [config for config in candidates if config in wanted]
        method = self._options.method if self._runner is not None else "grid"
        search = Search(space, candidates, seeds, method, self._options.seed)
        tuning = Tuning(op, problem, self._gpu, feasible, default, search, self._known, state, self._run)
        bounds = Bounds(state.limit, deadline, self._width)
        self._explorer = explorer = Explorer(tuning, self._pool, self._runner, self._lane, bounds)
        explorer.stopped = self._closed
        explorer.reuse(trials, settled=new is None)
        explorer.begin()
        if self._runner is None:
            explorer.run()
            explorer.close()
            return decide.predict(tuning)
        self._runner.prepare(op, problem)
        self._measure_others(tuning, self._runner)
        explorer.run()
        explorer.close()
        return decide.confirm(
            tuning, self._runner, self._options.rounds, self._options.seed, [winner] if winner is not None else []
        )

    def _by_roofline(self, space: Space, problem: Problem, feasible: Sequence[Config]) -> list[Config]:
        """The configs in the order a grid should try them: least padded work first."""
        work = space.work
        if work is None:
            return list(feasible)

        def floor_s(cost: Cost) -> float:
            return cost.flops / self._gpu.flops + cost.bytes / (4 * self._gpu.bandwidth)

        return sorted(feasible, key=lambda config: floor_s(work(problem, config)))

    def _measure_others(self, tuning: Tuning, runner: Runner) -> None:
        """Verifies and times every implementation that has no space: PyTorch's own choice, cuDNN …"""
        tuning.phase("measuring other implementations")
        for name, implementation in tuning.op.implementations.items():
            if self._known.revoked(tuning.op, name, {}):
                continue
            if implementation.space is None and implementation.can_run(tuning.problem, self._gpu):
                attempt, seconds = timed_attempt(runner, Candidate(name), None)
                if self._closed:
                    raise Stopped
                tuning.state.measuring_s += seconds
                tuning.record(Candidate(name), attempt, {})
