"""Tunes problems on one GPU, or for one that is not here: enumerate → compile → verify → time → confirm → store."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tilebook.device import Device
from tilebook.errors import GpuLost, OutOfTime, TuningError, one_line
from tilebook.op import Config, Cost, Op, Problem, Space
from tilebook.registry import Trial, Verdict
from tilebook.registry.searched import cut_short, unfinished
from tilebook.tuner import decide
from tilebook.tuner.budget import Job, Turn
from tilebook.tuner.explore import AHEAD, PATIENCE, Bounds, Explorer, Stopped, timed_attempt
from tilebook.tuner.hints import Hints
from tilebook.tuner.known import Field, Known, unsearched
from tilebook.tuner.process.compile import Compilers
from tilebook.tuner.process.runner import Candidate, Runner
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.search import Search
from tilebook.tuner.tuning import Entrant, Tuning


@dataclass(frozen=True)
class Options:
    """How long and how to search. `trials` limits the candidates of one implementation; None means all worth it.

    hints: what is tried first, after the default.
    """

    trials: int | None = None
    seed: int = 0
    method: str = "tpe"
    rounds: int = 30
    force: bool = False
    hints: Hints | None = None


class Outlook(IntEnum):
    """What there is to do for a problem, what is most wanted first."""

    NEW = 0
    CUT = 1
    SETTLED = 2
    """It has a verdict that nothing can be added to, unless a space has grown since."""


_KEPT = 3  # finalists of a standing verdict that take part again


class Session:
    """Tunes one problem after the other on the GPU behind `runner`, number `index` of the run. Without a runner it
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
        compilers: int | None = None,
        where: str = "",
    ) -> None:
        """lane: what the runner's requests run in, one after the other; a thread where none is given. compilers: how
        many of the pool's are this GPU's; by default its equal part. where: what people call the GPU."""
        self.index, self._where = index, where
        self._gpu, self._known, self._pool, self._runner = gpu, known, pool, runner
        self._options, self._run = options, run
        # As few as keep compilers and GPU busy: what is under way was proposed without knowing of one another.
        self._width = max(4, (pool.workers // run.gpus if compilers is None else compilers) + AHEAD)
        self._lane = lane or ThreadPoolExecutor(1, f"tilebook-gpu-{index}")
        self._explorers: list[Explorer] = []
        self._closed = self._expired = self._prepared = False

    def expire(self) -> None:
        """The run's time is up: as `close`, but the problem being tuned counts as not reached."""
        self._expired = True
        self.close()

    def close(self) -> None:
        """Ends what is under way, from any thread: a problem being tuned raises Stopped, and its trials stay."""
        self._closed = True
        for explorer in self._explorers:
            explorer.stopped = True
        self._lane.shutdown(wait=False, cancel_futures=True)
        if self._runner is not None:
            self._runner.close()

    def job(self, op: Op[Any], problem: Problem, weight: float | None = None) -> Job:
        """What a share is asked for. weight: where nobody says, the least time that a call takes on this GPU."""
        others = () if self._runner is None else [each.implementation for each in self._others(op, problem)]
        return Job(op.name, problem.floor_s(self._gpu) if weight is None else weight, others)

    def outlook(self, op: Op[Any], problem: Problem) -> Outlook:
        """What there is to do for a problem, as far as its verdict tells."""
        standing = None if self._options.force else self._known.standing(op, problem)
        if standing is None:
            return Outlook.NEW
        settled = not cut_short(standing) or (self._runner is None and standing.measured)
        return Outlook.SETTLED if settled else Outlook.CUT

    def tune(self, op: Op[Any], problem: Problem, until: float = float("inf")) -> ProblemState:
        """Tunes one problem until about then, by the run's clock, and stores its trials and its verdict.

        What goes wrong with the problem or the GPU is the state's `error`; `unreached` says that there was no time for
        a verdict. The caller ends the state's part in the run. Raises GpuLost, and Stopped once it is closed.
        """
        fields = self._fields(op, problem)
        turn = Turn(self._run.budget, op.name, until)
        state = ProblemState(
            op.name,
            problem.label,
            sum(len(each.feasible) for each in fields),
            sum(each.infeasible for each in fields),
            sum(self._limit(each) for each in fields),
            self.index,
            revoked=sum(each.revoked for each in fields),
            dtype=getattr(problem, "dtype", ""),
            clock=self._run.budget.clock,
            where=self._where,
        )
        self._run.begin(state)
        try:
            standing = None if self._options.force else self._known.standing(op, problem, fields)
            if standing is not None and self._settled(standing, fields):
                state.verdict, state.skipped = standing, True
                return state
            state.verdict = standing
            if not op.tunable.can_run(problem, self._gpu):
                raise TuningError("our kernel does not run this problem, so PyTorch's implementation serves it")
            if not turn.may_end(0.0):
                raise OutOfTime("the budget was spent before its turn")
            state.verdict = self._tune(op, problem, fields, standing, state, turn)
            self._known.record((), state.verdict)
        except (Stopped, TuningError) as broken:
            if self._expired:
                state.unreached = f"the budget ended while {state.phase}"
            elif self._closed:
                raise Stopped from broken
            elif isinstance(broken, GpuLost):
                raise
            elif isinstance(broken, OutOfTime):
                state.unreached = one_line(broken)
            else:
                state.verdict, state.error = None, one_line(broken)
            for explorer in self._explorers:
                explorer.close()
        return state

    def _settled(self, standing: Verdict, fields: Sequence[Field]) -> bool:
        """Is there nothing that a run with these options would try beyond what the verdict was chosen from?"""
        if self._runner is None and standing.measured:
            return True  # a prediction would not be served
        if cut_short(standing):
            return False
        return not any(unfinished(standing, f.name, self._limit(f)) or unsearched(standing, f) for f in fields)

    def _fields(self, op: Op[Any], problem: Problem) -> list[Field]:
        """What is to be searched: the space of our own kernel, then those of the others that can run here.

        To predict, our own alone: the model ranks configs of one kernel, and knows nothing of what sets two apart.
        """
        others = [] if self._runner is None else [each for each in op.tunables if each is not op.tunable]
        running = [op.tunable, *(each for each in others if each.can_run(problem, self._gpu))]
        fields = [self._known.field(each, problem, self._gpu) for each in running]
        return [each for each in fields if each.feasible or each is fields[0]]

    def _limit(self, field: Field) -> int:
        return min(len(field.feasible), self._options.trials or len(field.feasible))

    def _tune(
        self,
        op: Op[Any],
        problem: Problem,
        fields: Sequence[Field],
        standing: Verdict | None,
        state: ProblemState,
        turn: Turn,
    ) -> Verdict:
        """standing: the verdict over smaller spaces, or fewer, or one that was cut short."""
        entrants: list[Entrant] = []
        known: list[tuple[dict[Config, Trial], bool]] = []
        before: list[Candidate] = []
        for each in fields:
            finalists = _finalists(standing, each)
            before += [Candidate(each.name, config) for config in finalists]
            trials = {} if self._options.force else self._known.trials(op, problem, each)
            new: list[Config] | None = None
            if standing is not None and not unfinished(standing, each.name, self._limit(each)):
                new = unsearched(standing, each) or []
            entrants.append(self._entrant(op, problem, each, trials, finalists, new))
            known.append((trials, new is None))
        ours, ours_before = entrants[0], known[0][0]
        if ours.default in ours_before and ours_before[ours.default].failure is not None:
            del ours_before[ours.default]  # nothing can be decided without it, so it gets another chance
        tuning = Tuning(op, problem, self._gpu, entrants, self._known, state, self._run)
        self._explorers = [
            Explorer(tuning, each, self._pool, self._runner, self._lane, self._bounds(field, turn))
            for each, field in zip(entrants, fields, strict=True)
        ]
        for explorer, (trials, settled) in zip(self._explorers, known, strict=True):
            explorer.stopped = self._closed
            explorer.reuse(trials, settled)
        self._explorers.sort(key=lambda each: each.effort)
        self._explorers[0].begin()
        if self._runner is None:
            self._explore(turn.until)
            return decide.predict(tuning)
        began = turn.now()
        self._runner.prepare(op, problem)
        if self._prepared:  # the first time a process had to start
            turn.note("prepare", turn.now() - began)
        self._prepared = True
        fallback, others = (found := self._others(op, problem))[:1], found[1:]  # somebody else's kernel has neither
        self._measure(tuning, self._runner, fallback, turn)  # while the compilers start
        self._explore(turn.search_until([each.implementation for each in others]))
        self._measure(tuning, self._runner, others, turn)
        if op.answers is not None and tuning.default not in tuning.times:
            # Nobody has promised that the first config of somebody else's list is right, or fits.
            ours.default = next((c for c in ours.feasible if ours.candidate(c) in tuning.times), ours.default)
        return decide.confirm(tuning, self._runner, self._options.rounds, self._options.seed, before, turn)

    def _bounds(self, field: Field, turn: Turn) -> Bounds:
        return Bounds(self._limit(field), self._width, PATIENCE, turn)

    def _entrant(
        self,
        op: Op[Any],
        problem: Problem,
        field: Field,
        trials: Iterable[Config],
        finalists: Sequence[Config],
        new: Sequence[Config] | None,
    ) -> Entrant:
        """new: the only configs to search beside the default and the standing verdict's finalists; None for all."""
        # A revoked default is replaced as dispatch replaces it, so that the comparison is with what would run.
        allowed = frozenset(field.feasible)
        default = next((each for each in field.space.defaults(problem, self._gpu) if each in allowed), None)
        if default is None:
            raise TuningError(f"every config of {field.name} is {'revoked' if field.revoked else 'rejected'}")
        first = [default, *finalists]
        candidates = self._by_roofline(field.space, problem, field.feasible)
        if new is not None:
            wanted = {*new, *trials, *first}
            candidates = [config for config in candidates if config in wanted]
        hinted = self._options.hints.of(op, field.space, default) if self._options.hints else []
        seeds = [*first, *hinted, *self._known.seeds(op, problem, field)]
        search = Search(field.space, candidates, seeds, self._options.method, self._options.seed)
        return Entrant(field.implementation, field.feasible, default, search)

    def _explore(self, deadline: float) -> None:
        """One implementation after the other, each with its share of the time that is left.

        Small spaces come first: they are done soon, and the best may be one of theirs.
        """
        left = len(self._explorers)
        for explorer, following in itertools.zip_longest(self._explorers, self._explorers[1:]):
            now = self._run.budget.clock()
            explorer.run(now + max(0.0, deadline - now) / left, following)
            explorer.close()
            left -= 1

    def _by_roofline(self, space: Space, problem: Problem, feasible: Sequence[Config]) -> list[Config]:
        """The configs in the order a grid should try them: least padded work first."""
        work = space.work
        if work is None:
            return list(feasible)

        def floor_s(cost: Cost) -> float:
            return cost.flops / self._gpu.flops + cost.bytes / (4 * self._gpu.bandwidth)

        return sorted(feasible, key=lambda config: floor_s(work(problem, config)))

    def _others(self, op: Op[Any], problem: Problem) -> list[Candidate]:
        """Every implementation without a space that can run the problem: PyTorch's own choice first and what it has for
        graphs, then, where there is a budget, those that take least time to measure."""
        running = [
            Candidate(name)
            for name, each in op.implementations.items()
            if each.space is None and not self._known.revoked(each, {}) and each.can_run(problem, self._gpu)
        ]

        def order(candidate: Candidate) -> tuple[bool, bool, float]:
            budget, name = self._run.budget, candidate.implementation
            expected = budget.expected(op.name, f"measure {name}") if budget.limited else 0.0
            return name != "torch", name not in op.pytorchs, expected

        return sorted(running, key=order)

    def _measure(self, tuning: Tuning, runner: Runner, others: Iterable[Candidate], turn: Turn) -> None:
        """Verifies and times these, PyTorch's own choices always, the rest where there is time for them.

        Some compile at their first call, for seconds in which no candidate is measured.
        """
        for candidate in others:
            part = f"measure {candidate.implementation}"
            own = candidate.implementation in tuning.op.pytorchs
            if not own and not turn.affords(turn.expected(part) + turn.finish()):
                tuning.unmeasured.append(candidate.implementation)
                continue
            tuning.phase(f"measuring {candidate}")
            attempt, seconds = timed_attempt(runner, candidate, None, turn.now)
            if self._closed:
                raise Stopped
            turn.note(part, seconds)
            tuning.state.measuring_s += seconds
            tuning.record(candidate, attempt, {})


def _finalists(standing: Verdict | None, field: Field) -> list[Config]:
    """The best configs that a standing verdict has of an implementation: what is new must beat those too."""
    ranked = [] if standing is None else [Config(values) for name, values in standing.ranking() if name == field.name]
    return [config for config in ranked if config in field.feasible][:_KEPT]
