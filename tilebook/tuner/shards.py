"""A run's problems on one or several GPUs of a host: each takes the next when it is free; a problem is never split."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna

from tilebook.op import Op, Problem
from tilebook.tuner.budget import Budget, Job
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.session import Outlook, Session

_CHANCES = 2
"""So many GPUs may fail at a problem before the problem counts as failed: one may be the GPU's fault."""


@dataclass
class _Task:
    place: int
    op: Op[Any]
    problem: Problem
    job: Job
    outlook: Outlook = Outlook.NEW
    failed_on: set[int] = field(default_factory=set)


class _Queue:
    """The problems that no GPU has taken, in the order in which they are. One that failed on a GPU comes back, for
    another GPU."""

    def __init__(self, tasks: Sequence[_Task], gpus: int) -> None:
        self._waiting, self._gpus = list(tasks), gpus
        self._chances = min(_CHANCES, gpus)
        self._busy = 0
        self._changed = threading.Condition()
        self.stopped = False

    def take(self, gpu: int) -> _Task | None:
        """The next problem for this GPU; None once none can come any more."""
        with self._changed:
            while not self.stopped:
                for task in self._waiting:
                    if gpu not in task.failed_on:
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
        return budget.share([task.job, *alike], self._gpus)

    def give_back(self, task: _Task, gpu: int, failed: bool) -> bool:
        """The GPU is done with a problem. Returns whether another will try it again."""
        with self._changed:
            self._busy -= 1
            if failed:
                task.failed_on.add(gpu)
            again = failed and not self.stopped and len(task.failed_on) < self._chances
            if again:
                self._waiting.append(task)
            self._changed.notify_all()
            return again

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


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
    tasks = [
        _Task(place, op, problem, sessions[0].job(op, problem, None if weights is None else weights[place]))
        for place, (op, problem) in enumerate(problems)
    ]
    if run.budget.limited:
        for task in tasks:
            task.outlook = sessions[0].outlook(task.op, task.problem)
        tasks.sort(key=lambda task: (task.outlook, -task.job.weight))
    queue = _Queue(tasks, len(sessions))
    states: dict[int, ProblemState] = {}
    under_way: dict[int, _Task] = {}

    def work(session: Session) -> None:
        while (task := queue.take(session.index)) is not None:
            until, state = queue.share(task, run.budget), None
            if until is not None or task.outlook is Outlook.SETTLED:
                under_way[session.index] = task
                state = session.tune(task.op, task.problem, run.budget.clock() if until is None else until)
            again = queue.give_back(task, session.index, state is not None and bool(state.error))
            if state is not None:
                under_way.pop(session.index)
                if not again:
                    states[task.place] = state
                run.end(state, again)

    def unreached(why: str) -> None:
        """Ends the part of each problem that has no state: those under way, and those that no GPU has taken."""
        begun = {under_way[each.gpu].place: each for each in run.now if each.gpu in under_way}
        for task in tasks:
            if task.place not in states:
                state = begun.get(task.place) or _unbegun(task, run.budget)
                states[task.place], state.unreached = state, why
                run.end(state)

    try:
        with _limit(run.budget, queue, sessions):
            if len(sessions) == 1:
                work(sessions[0])
            else:
                _side_by_side(sessions, work, queue)
        unreached("the budget was spent before its turn")
    except KeyboardInterrupt:
        unreached("interrupted")
        raise
    finally:
        for session in sessions:
            session.close()
    return [states[place] for place in sorted(states)]


def _unbegun(task: _Task, budget: Budget) -> ProblemState:
    dtype = getattr(task.problem, "dtype", "")
    return ProblemState(task.op.name, task.problem.label, 0, 0, 0, dtype=dtype, clock=budget.clock)


@contextmanager
def _limit(budget: Budget, queue: _Queue, sessions: Sequence[Session]) -> Iterator[None]:
    """Ends whatever the sessions are doing when the budget's last limit has passed, by the real clock."""

    def expire() -> None:
        queue.stop()
        for session in sessions:
            session.expire()

    timer = threading.Timer(max(0.0, budget.limit - budget.clock()), expire) if budget.limited else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _side_by_side(sessions: Sequence[Session], work: Callable[[Session], None], queue: _Queue) -> None:
    with warnings.catch_warnings(), ThreadPoolExecutor(len(sessions), "tilebook-session") as threads:
        # The filter that the search sets for itself is the process's, and another thread may undo it at any time.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        futures = [threads.submit(work, session) for session in sessions]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            queue.stop()
            for session in sessions:
                session.close()
            raise
