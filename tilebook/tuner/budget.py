"""The time of a run: shared by what problems are worth, heaviest first, with room for what a verdict needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LATE = 1.15
"""A problem that was begun may be confirmed until this many times the budget …"""

GRACE_S = 8.0
"""… and so long after that everything is ended, whatever it is doing."""

SEARCH_S = 3.0
"""A problem for whose search there is less time is not begun: that is the default and a dozen others."""

_FEWEST, _USUAL = 3, 8  # finalists that a confirmation has at least, and where there is time

_OTHERS = 0.25  # of a problem's time is kept for implementations that take long to measure

# Seconds, before a run knows better: what was usual for attention on an H200, where 82 verdicts took 0.25 to 2.3 s for
# each finalist, and cuDNN 0.3 to 1.8 s to be measured.
_GUESSES = {"prepare": 2.0, "first": 2.0, "each": 0.7, "fresh": 4.0, "measure": 2.0, "try": 0.0}


@dataclass(frozen=True)
class Job:
    """What a share is asked for: a problem of an op, by name. weight: what it is worth to whoever tunes, in any unit.

    others: the implementations without a space that are to be measured.
    """

    op: str
    weight: float = 1.0
    others: Sequence[str] = ()


@dataclass
class Budget:
    """The seconds that a run may take, None without a limit. `clock` says what time it is; tests have their own.

    measured: on a GPU. Predictions need no preparation and no confirmation.

    What the parts of a problem take is learned as the run goes, by op, the last time counting:
    "prepare", inputs and truths; "first", the first finalist's verification, and "each" further one's; "fresh", the
    winner's in a fresh process; "measure NAME", what another implementation takes; "try NAME", a config of a tunable.
    """

    seconds: float | None = None
    measured: bool = True
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)
    _begun: bool = False
    _took: dict[tuple[str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def limited(self) -> bool:
        return self.seconds is not None

    @property
    def end(self) -> float:
        """When the budget is spent."""
        return float("inf") if self.seconds is None else self.began + self.seconds

    @property
    def last(self) -> float:
        """When what was begun should be done."""
        return float("inf") if self.seconds is None else self.began + LATE * self.seconds

    @property
    def limit(self) -> float:
        """When everything is ended."""
        return self.last + GRACE_S

    @property
    def left_s(self) -> float:
        return self.end - self.clock()

    def note(self, op: str, part: str, seconds: float) -> None:
        """A part of a problem took so long."""
        self._took[op, part] = self._took["", part] = seconds

    def expected(self, op: str, part: str) -> float:
        """Seconds that a part will take, by what it took for the op, or for any."""
        if not self.measured:
            return 0.0
        return self._took.get((op, part), self._took.get(("", part), _GUESSES[part.split()[0]]))

    def finish(self, op: str, finalists: int = _FEWEST) -> float:
        """Seconds for a confirmation."""
        first, each, fresh = (self.expected(op, part) for part in ("first", "each", "fresh"))
        return first + (finalists - 1) * each + fresh

    def least(self, job: Job) -> float:
        """Seconds below which a problem is not worth beginning."""
        prepare_s = self.expected(job.op, "prepare")
        return prepare_s + SEARCH_S + self.others(job.op, job.others) + self.finish(job.op)

    def others(self, op: str, names: Sequence[str], most_s: float = 0.0) -> float:
        """Seconds to measure these implementations; what takes long only within `most_s`, since it can be left out."""
        each = [self.expected(op, f"measure {name}") for name in names]
        return min(sum(each), max(most_s, sum(min(one, _GUESSES["measure"]) for one in each)))

    def share(self, jobs: Sequence[Job], gpus: int = 1) -> float | None:
        """Until when the first of these jobs may take, one for each GPU at a time; None where it cannot be reached.

        As many of them as there is time for, from the first on, have what they need at least; what is over goes to
        these by their weights. The first of a run is always begun.
        """
        if self.seconds is None:
            return float("inf")
        now, own, needed = self.clock(), self.least(jobs[0]), 0.0
        if self._begun and now + own > (self.end + self.last) / 2:
            return None
        self._begun = True
        left = max(0.0, self.end - now)
        reached: list[Job] = []
        for job in jobs:
            needed += self.least(job)
            if reached and needed > left * gpus:
                needed -= self.least(job)
                break
            reached.append(job)
        over, worth = max(0.0, left * gpus - needed), sum(each.weight for each in reached)
        return now + min(left, own + over * (jobs[0].weight / worth if worth else 1 / len(reached)))


@dataclass(frozen=True)
class Turn:
    """One problem's part of a run's time: it should be done at `until`."""

    budget: Budget
    op: str
    until: float

    @property
    def limited(self) -> bool:
        return self.budget.limited

    def now(self) -> float:
        return self.budget.clock()

    def note(self, part: str, seconds: float) -> None:
        self.budget.note(self.op, part, seconds)

    def expected(self, part: str) -> float:
        return self.budget.expected(self.op, part)

    def finish(self) -> float:
        return self.budget.finish(self.op)

    def affords(self, seconds: float) -> bool:
        """Is there so much left of this problem's part?"""
        return self.now() + seconds <= self.until

    def may_end(self, seconds: float) -> bool:
        """May what has been begun take so much longer, at the expense of problems that are worth less?"""
        return self.now() + seconds <= max(self.until, self.budget.last)

    def search_until(self, others: Sequence[str] = ()) -> float:
        """When the search must end, so that these other implementations can be measured and the best confirmed."""
        others_s = self.budget.others(self.op, others, _OTHERS * (self.until - self.now()))
        rest = others_s + self.budget.finish(self.op, _USUAL)
        return max(self.until - rest, min(self.now() + SEARCH_S, self.budget.last - self.budget.finish(self.op)))
