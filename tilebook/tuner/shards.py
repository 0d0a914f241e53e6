"""A run's problems on several GPUs of one model: each takes the next when it is free; a problem is never split."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna

from tilebook.errors import GpuLost
from tilebook.op import Op, Problem
from tilebook.tuner.budget import Budget, Job
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.session import Outlook, Session

_CHANCES = 2
"""So many GPUs may fail at a problem before the problem counts as failed: one may be the GPU's fault."""

_LOSSES = 3
"""So many GPUs may be lost while a problem is tuned on them before it counts as failed: it may be what ends them."""


@dataclass
class _Task:
    """failure: what is said of it where nobody tries it again."""

    place: int
    op: Op[Any]
    problem: Problem
    job: Job
    outlook: Outlook = Outlook.NEW
    failed_on: set[int] = field(default_factory=set)
    lost_on: list[int] = field(default_factory=list)
    failure: ProblemState | None = None


class _Queue:
    """The problems that no GPU has taken, in the order in which they are. One that failed on a GPU comes back, for
    another GPU; one whose GPU was lost, for any, for another one first."""

    def __init__(self, tasks: Sequence[_Task]) -> None:
        self._waiting = list(tasks)
        self._gpus: set[int] = set()
        self._busy = 0
        self._changed = threading.Condition()
        self.stopped = False

    @property
    def over(self) -> bool:
        """Is there nothing left that a GPU which came now would be given? What failed is for those that are here."""
        with self._changed:
            return self.stopped or not (self._busy or any(not task.failed_on for task in self._waiting))

    def join(self, gpu: int) -> None:
        with self._changed:
            self._gpus.add(gpu)

    def leave(self, gpu: int) -> None:
        with self._changed:
            self._gpus.discard(gpu)
            self._changed.notify_all()

    def take(self, gpu: int) -> _Task | None:
        """The next problem for this GPU; None once none can come any more."""
        with self._changed:
            while not self.stopped:
                mine = [task for task in self._waiting if gpu not in task.failed_on]
                if mine:
                    task = next((each for each in mine if gpu not in each.lost_on), mine[0])
                    self._waiting.remove(task)
                    self._busy += 1
                    return task
                if not self._busy:
                    return None
                self._changed.wait()
            return None

    def share(self, task: _Task, budget: Budget) -> float | None:
        """Until when a problem that was taken may be tuned; None where there is no time to begin it."""
        with self._changed:
            # What is settled takes no time, unless it turns out not to be; then what is left is for its like.
            alike = [each.job for each in self._waiting if each.outlook <= max(task.outlook, Outlook.CUT)]
            gpus = len(self._gpus)
        return budget.share([task.job, *alike], gpus)

    def give_back(self, task: _Task, gpu: int, failure: ProblemState | None = None) -> bool:
        """The GPU is done with a problem. Returns whether another will try it again."""
        with self._changed:
            self._busy -= 1
            again = False
            if failure is not None:
                task.failure = failure
                task.failed_on.add(gpu)
                again = len(task.failed_on) < _CHANCES and not self._gpus <= task.failed_on and not self.stopped
            if again:
                self._waiting.append(task)
            self._changed.notify_all()
            return again

    def lost(self, task: _Task, gpu: int) -> bool:
        """The GPU is gone, and its problem is the next for another one. Returns whether it may be tried again."""
        with self._changed:
            self._busy -= 1
            self._gpus.discard(gpu)
            task.lost_on.append(gpu)
            again = len(task.lost_on) < _LOSSES and not self.stopped
            if again:
                self._waiting.insert(0, task)
            self._changed.notify_all()
            return again

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


class Shards:
    """The problems of a run for the GPUs of one model, which may come and go; each is a session in a thread."""

    def __init__(
        self,
        problems: Sequence[tuple[Op[Any], Problem]],
        first: Session,
        run: Run,
        weights: Sequence[float] | None = None,
    ) -> None:
        """first: any session on a GPU of the model, which is asked what there is to do. weights: see `tune_all`."""
        self._run = run
        self._tasks = [
            _Task(place, op, problem, first.job(op, problem, None if weights is None else weights[place]))
            for place, (op, problem) in enumerate(problems)
        ]
        order = self._tasks
        if run.budget.limited:
            for task in order:
                task.outlook = first.outlook(task.op, task.problem)
            order = sorted(order, key=lambda task: (task.outlook, -task.job.weight))
        self._queue = _Queue(order)
        self._sessions: list[Session] = []
        self._states: dict[int, ProblemState] = {}
        self._under_way: dict[int, _Task] = {}

    @property
    def over(self) -> bool:
        """Is there nothing to do for a GPU that comes now?"""
        return self._queue.over

    @property
    def states(self) -> list[ProblemState]:
        """What came of the problems, in their order."""
        return [self._states[place] for place in sorted(self._states)]

    def join(self, session: Session) -> None:
        """A GPU is here; `serve` says when it is free."""
        self._sessions.append(session)
        self._queue.join(session.index)
        if self._queue.stopped:
            session.close()

    def serve(self, session: Session) -> None:
        """Tunes one problem after the other on this GPU, until none can come any more. Raises GpuLost."""
        try:
            while (task := self._queue.take(session.index)) is not None:
                self._serve(session, task)
        finally:
            self._queue.leave(session.index)

    def _serve(self, session: Session, task: _Task) -> None:
        run = self._run
        until = self._queue.share(task, run.budget)
        if until is None and task.outlook is not Outlook.SETTLED:
            self._queue.give_back(task, session.index)
            return
        self._under_way[session.index] = task
        try:
            state = session.tune(task.op, task.problem, run.budget.clock() if until is None else until)
        except GpuLost as lost:
            again = self._queue.lost(task, session.index)
            state = next(each for each in run.now if each.gpu == session.index)
            if again:
                state.unreached = str(lost)
            else:
                state.error = f"{len(task.lost_on)} GPUs were lost while it was tuned on them: {lost}"
            self._done(session, task, state, again)
            raise
        again = self._queue.give_back(task, session.index, state if state.error else None)
        self._done(session, task, state, again)

    def _done(self, session: Session, task: _Task, state: ProblemState, again: bool) -> None:
        self._under_way.pop(session.index)
        if not again:
            self._states[task.place] = state
        self._run.end(state, again)

    def finish(self, why: str) -> None:
        """Ends the part of each problem that has no state: those under way, those that no GPU has taken, and those for
        which no other GPU came."""
        run = self._run
        begun = {self._under_way[each.gpu].place: each for each in run.now if each.gpu in self._under_way}
        for task in self._tasks:
            if task.place not in self._states:
                state = begun.get(task.place) or task.failure or _unbegun(task, run.budget)
                self._states[task.place] = state
                state.unreached = "" if state.error else why
                run.end(state)

    def expire(self) -> None:
        """The run's time is up: ends whatever the sessions are doing."""
        self._queue.stop()
        for session in list(self._sessions):
            session.expire()

    def close(self) -> None:
        """Ends whatever the sessions are doing, from any thread; none gets another problem."""
        self._queue.stop()
        for session in list(self._sessions):
            session.close()


def tune_all(
    sessions: Sequence[Session],
    problems: Sequence[tuple[Op[Any], Problem]],
    run: Run,
    weights: Sequence[float] | None = None,
) -> list[ProblemState]:
    """Tunes the problems on the sessions' GPUs. With a budget, what is worth most comes first and has most of it.

    weights: what each is worth; by default the least time that a call takes. Returns the states in the order of the
    problems. Whatever is raised in one session ends all of them; an interrupt, too, leaves a state for each in the run.
    """
    shards = Shards(problems, sessions[0], run, weights)
    for session in sessions:
        shards.join(session)
    try:
        with limit(run.budget, shards.expire):
            if len(sessions) == 1:
                shards.serve(sessions[0])
            else:
                _side_by_side(sessions, shards)
        shards.finish("the budget was spent before its turn")
    except KeyboardInterrupt:
        shards.finish("interrupted")
        raise
    finally:
        shards.close()
    return shards.states


def _unbegun(task: _Task, budget: Budget) -> ProblemState:
    dtype = getattr(task.problem, "dtype", "")
    return ProblemState(task.op.name, task.problem.label, 0, 0, 0, dtype=dtype, clock=budget.clock)


@contextmanager
def limit(budget: Budget, expire: Callable[[], None]) -> Iterator[None]:
    """Calls `expire` when the budget's last limit has passed, by the real clock, unless the block has ended."""
    timer = threading.Timer(max(0.0, budget.limit - budget.clock()), expire) if budget.limited else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


@contextmanager
def quiet() -> Iterator[None]:
    """Around several sessions in threads: the filter of warnings that a search sets for itself is the process's, and
    another thread may undo it at any time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _side_by_side(sessions: Sequence[Session], shards: Shards) -> None:
    with quiet(), ThreadPoolExecutor(len(sessions), "tilebook-session") as threads:
        futures = [threads.submit(shards.serve, session) for session in sessions]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            shards.close()
            raise
