"""Ours or PyTorch's, where that depends on the program: its own training steps tell.

A kernel of ours that is called from Python costs the host more than PyTorch's own function does, its gradient most of
all. In a program whose GPU has work in store that costs nothing, and what the kernel is faster by is gained. In one
whose GPU waits for the next call it is lost. No look at one call tells the two apart. So steps of an optimizer in which
ours serve take turns with steps in which PyTorch does, until it is clear which are shorter.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from torch._compile import _disable_dynamo

from tilebook.frames import as_it_is

TURN = 6
"""Steps of a turn."""

SETTLING = 2
"""The first steps of a turn count for nothing: the GPU still does what the turn before has left it."""

ENOUGH = 16
"""Steps of each that count before anything is concluded."""

_MOST_OTHERS = 32
"""So many steps of others after its last one, an optimizer is done with."""

_GAIN = 0.99
"""Ours serve from then on if three quarters of their steps take less than this share of PyTorch's median."""


class Steps:
    """Steps of a program that takes turns: whose turn it is, how long they took, and who is to serve."""

    def __init__(self) -> None:
        self.ours = False
        self.verdict: bool | None = None
        self.calls = 0
        self._taken = 0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self._last = self._since = 0.0
        self._whose, self._others = 0, 0

    def stepped(self, optimizer: int, now: float) -> None:
        """An optimizer, known by its number, has taken a step.

        Where several take steps in turn, a step of the program is all of them: from one to its next.
        """
        before, self._last = self._last, now
        if self.calls and before:
            self._since += now - before
            self._others += 1
            if not self._whose or self._others > _MOST_OTHERS:
                self._whose = optimizer
            if optimizer == self._whose:
                self.end(self._since)
                self._since, self._others = 0.0, 0
        self.calls = 0

    def end(self, seconds: float) -> None:
        """A step in which calls were made that take part has ended."""
        self._taken += 1
        if self._taken > SETTLING:
            self._seconds[self.ours].append(seconds)
        if self._taken == TURN:
            self._taken, self.ours = 0, not self.ours
            self._conclude()

    def _conclude(self) -> None:
        theirs, mine = self._seconds[False], self._seconds[True]
        if min(len(theirs), len(mine)) >= ENOUGH:
            self.verdict = statistics.quantiles(mine, n=4)[2] < _GAIN * statistics.median(theirs)


class Pace:
    """Who serves one kind of call that wants gradients: PyTorch, until the program's steps have told otherwise."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps = _trial.joined()

    @as_it_is
    def host_bound(self) -> bool:
        """Is a call made now PyTorch's?"""
        steps = self._steps
        if steps.verdict is not None:
            return not steps.verdict
        steps.calls += 1
        return not steps.ours


class _Trial:
    """The turns that are being taken, and the hook by which optimizers tell of their steps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: Steps | None = None
        self._handle: Any = None

    def joined(self) -> Steps:
        """The turns that one more kind of call takes part in: those under way, or new ones."""
        with self._lock:
            if self._steps is None or self._steps.verdict is not None:
                self._steps = Steps()
            if self._handle is None:
                from torch.optim.optimizer import register_optimizer_step_post_hook

                self._handle = register_optimizer_step_post_hook(self._ended)
            return self._steps

    @_disable_dynamo  # a compiled optimizer's step has no clock
    def _ended(self, optimizer: Any, *_: Any) -> None:
        steps = self._steps
        if steps is None:
            return
        steps.stepped(id(optimizer), time.perf_counter())
        if steps.verdict is not None:
            with self._lock:
                if steps is self._steps and self._handle is not None:
                    self._handle.remove()
                    self._handle = None


_trial = _Trial()
