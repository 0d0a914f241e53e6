"""What a tuning run tells while it goes: counts per problem, the best so far, where the time went."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from tilebook.registry import Failure, Verdict
from tilebook.tuner.budget import Budget


@dataclass
class ProblemState:
    """One problem of the run, as far as it has come. Times in seconds, `best_ms` and `default_ms` in milliseconds.

    compiling_s: summed over the compile processes. measuring_s, waiting_s: while candidates were tried, how long the
    GPU worked and how long it waited for one. confirming_s: the finalists' interleaved samples, fresh process included.
    unreached: why there is no verdict of this run though nothing went wrong; one from before may stand. clock: what
    the times are by. where: what people call the GPU; by default by its number.
    """

    op: str
    label: str
    feasible: int
    infeasible: int
    limit: int
    gpu: int = 0
    phase: str = "preparing"
    revoked: int = 0
    compiled: int = 0
    passed: int = 0
    timed: int = 0
    reused: int = 0
    rejected: Counter[Failure] = field(default_factory=Counter)
    best_ms: float | None = None
    best: str = ""
    default_ms: float | None = None
    compiling_s: float = 0.0
    measuring_s: float = 0.0
    waiting_s: float = 0.0
    confirming_s: float = 0.0
    seconds: float = 0.0
    dtype: str = ""
    verdict: Verdict | None = None
    skipped: bool = False
    unreached: str = ""
    error: str = ""
    clock: Callable[[], float] = time.monotonic
    where: str = ""
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def tried(self) -> int:
        return self.passed + sum(self.rejected.values())

    @property
    def elapsed_s(self) -> float:
        return self.seconds or self.clock() - self.started

    @property
    def busy(self) -> float | None:
        """The GPU's share of work while candidates were tried; None where none was."""
        total = self.measuring_s + self.waiting_s
        return self.measuring_s / total if self.measuring_s else None


class Watcher(Protocol):
    """What a run tells as it goes, from any of its threads."""

    def changed(self, run: Run) -> None:
        """A step was made in one of the problems under way."""

    def ended(self, run: Run, state: ProblemState, again: bool) -> None:
        """A problem is done with; `again`: on this GPU, and another will try it."""

    def told(self, run: Run, text: str) -> None:
        """Something happened to the run's GPUs that people want to know of."""


@dataclass
class Run:
    """A whole run: its finished problems, those under way (one a GPU), its time, and who watches it."""

    total: int
    measured: bool
    budget: Budget = field(default_factory=Budget)
    gpus: int = 1
    done: list[ProblemState] = field(default_factory=list)
    now: list[ProblemState] = field(default_factory=list)
    watchers: list[Watcher] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, state: ProblemState) -> None:
        with self._lock:
            self.now = sorted([*self.now, state], key=lambda each: each.gpu)
        self.changed()

    def changed(self) -> None:
        """To be called after every step, from any thread."""
        for watcher in self.watchers:
            watcher.changed(self)

    def tell(self, text: str) -> None:
        """Says what happened to the run's GPUs, from any thread."""
        for watcher in self.watchers:
            watcher.told(self, text)

    def end(self, state: ProblemState, again: bool = False) -> None:
        """`again`: it failed here, and another GPU will try it."""
        state.seconds = state.seconds or max(state.clock() - state.started, 1e-9)
        with self._lock:
            self.now = [each for each in self.now if each is not state]
            if not again:
                self.done.append(state)
        self.changed()
        for watcher in self.watchers:
            watcher.ended(self, state, again)


Watch = Callable[[Run], AbstractContextManager[object]]
"""Watches a run while a block lasts."""
