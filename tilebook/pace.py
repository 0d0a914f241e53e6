"""Who waits for whom: the GPU for the host, or the host for the GPU? Seen where calls are made, at little cost.

A kernel of ours that is called from Python costs the host more than PyTorch's own function does, its gradient most of
all. In a program whose GPU has work in store that costs nothing, and what the kernel is faster by is gained. In one
whose GPU waits for the next call it is lost. The same call may be in either: what tells them apart is whether the
stream has come to its end when the call is made.
"""

from __future__ import annotations

import torch

WINDOW = 32
"""Looks from which something is concluded. The first window is let pass: a program's first calls say nothing."""

RARELY = 16
"""After that, of so many calls one looks."""

_MOSTLY_BUSY, _OFTEN_IDLE = 1 / 3, 1 / 2
"""Idle in no more than this share of a window, the GPU is what is waited for; in more than that, it is the host."""


def idle() -> bool:
    """Has the current stream come to its end? Not to be asked while a graph is captured."""
    return torch.cuda.current_stream().query()


class Pace:
    """What was seen of one kind of call, which PyTorch serves until the GPU is seen to be behind.

    Ours serve from then on, unless the GPU waits for them: then PyTorch does again, for good.
    """

    __slots__ = ("_calls", "_idle", "_looks", "_windows", "ours", "settled")

    def __init__(self) -> None:
        self.ours, self.settled = False, False
        self._calls = self._looks = self._idle = self._windows = 0

    def host_bound(self) -> bool:
        """Is a call made now better PyTorch's, because the host is what is waited for?"""
        self._calls += 1
        if not self.settled and (self._windows < 2 or self._calls % RARELY == 0):
            self._look()
        return not self.ours

    def _look(self) -> None:
        self._looks += 1
        self._idle += idle()
        if self._looks < WINDOW:
            return
        share, self._looks, self._idle = self._idle / WINDOW, 0, 0
        self._windows += 1
        if self._windows == 1:
            return
        if self.ours and share > _OFTEN_IDLE:
            self.ours, self.settled = False, True
        elif share <= _MOSTLY_BUSY:
            self.ours = True
