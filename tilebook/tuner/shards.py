"""Several GPUs of one host: each takes the next problem when it is free; a problem is never split."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import optuna

from tilebook.op import Op, Problem
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.session import Session

_CHANCES = 2
"""So many GPUs may fail at a problem before the problem counts as failed: one may be the GPU's fault."""


@dataclass
class _Job:
    place: int
    op: Op[Any]
    problem: Problem
    failed_on: set[int] = field(default_factory=set)


class _Queue:
    """The problems that no GPU has taken. One that failed on a GPU comes back, for another GPU."""

    def __init__(self, problems: Sequence[tuple[Op[Any], Problem]], gpus: int) -> None:
        self._waiting = [_Job(place, op, problem) for place, (op, problem) in enumerate(problems)]
        self._chances = min(_CHANCES, gpus)
        self._busy = 0
        self._changed = threading.Condition()
        self.stopped = False

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, gpu: int) -> _Job | None:
        """The next problem for this GPU; None once none can come any more."""
        with self._changed:
            while not self.stopped:
                for job in self._waiting:
                    if gpu not in job.failed_on:
                        self._waiting.remove(job)
                        self._busy += 1
                        return job
                if not self._busy:
                    return None
                self._changed.wait()
            return None

    def give_back(self, job: _Job, gpu: int, failed: bool) -> bool:
        """The GPU is done with a problem. Returns whether another will try it again."""
        with self._changed:
            self._busy -= 1
            if failed:
                job.failed_on.add(gpu)
            again = failed and len(job.failed_on) < self._chances
            if again:
                self._waiting.append(job)
            self._changed.notify_all()
            return again

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


def tune_all(sessions: Sequence[Session], problems: Sequence[tuple[Op[Any], Problem]], run: Run) -> list[ProblemState]:
    """Tunes the problems on the sessions' GPUs, sharing the run's time that is left evenly among what is left.

    Returns their states in the order of the problems. Whatever is raised in one session ends all of them.
    """
    queue = _Queue(problems, len(sessions))
    states: dict[int, ProblemState] = {}

    def work(session: Session) -> None:
        while (job := queue.take(session.index)) is not None:
            state = session.tune(job.op, job.problem, run.share(len(queue) + 1))
            again = queue.give_back(job, session.index, bool(state.error))
            if not again:
                states[job.place] = state
            run.end(state, again)

    try:
        if len(sessions) == 1:
            work(sessions[0])
        else:
            _side_by_side(sessions, work, queue)
    finally:
        for session in sessions:
            session.close()
    return [states[place] for place in sorted(states)]


def _side_by_side(sessions: Sequence[Session], work: Any, queue: _Queue) -> None:
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
