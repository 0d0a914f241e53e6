"""What a tuning run tells while it goes: counts per problem, the best so far, where the time went."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from tilebook.registry import Failure, Verdict


@dataclass
class ProblemState:
    """One problem of the run, as far as it has come. Times in seconds, `best_ms` and `default_ms` in milliseconds."""

    op: str
    label: str
    feasible: int
    infeasible: int
    limit: int
    compiled: int = 0
    passed: int = 0
    verified: int = 0
    timed: int = 0
    reused: int = 0
    rejected: Counter[Failure] = field(default_factory=Counter)
    best_ms: float | None = None
    best: str = ""
    default_ms: float | None = None
    compiling_s: float = 0.0
    measuring_s: float = 0.0
    waiting_s: float = 0.0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    verdict: Verdict | None = None
    skipped: bool = False
    error: str = ""

    @property
    def tried(self) -> int:
        return self.passed + sum(self.rejected.values()) + self.reused

    @property
    def elapsed_s(self) -> float:
        return self.seconds or time.monotonic() - self.started


@dataclass
class Run:
    """A whole run: its finished problems, the current one, and when it must end."""

    total: int
    measured: bool
    deadline: float | None = None
    done: list[ProblemState] = field(default_factory=list)
    now: ProblemState | None = None

    def begin(self, state: ProblemState) -> None:
        self.now = state
        self.changed()

    def changed(self) -> None:
        """Called after every step; a view overrides it."""

    def end(self) -> None:
        assert self.now is not None
        self.now.seconds = max(time.monotonic() - self.now.started, 1e-9)
        self.done.append(self.now)
        self.now = None
        self.changed()
