"""What is noted of a process's calls: how many there are of each problem, and what those take that were timed."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from tilebook import dispatch
from tilebook.dispatch.choice import Choice
from tilebook.dispatch.misses import estimated_ms

_SAMPLES = 128  # that are kept of a problem, the newest
_ENOUGH = 16  # of each problem that has been met, for the first part of a profile
_FREE = 8  # of them that did not wait for the host
_PATIENCE = 64  # after which it always waits
_SLICE = 20  # of 4 slices of 2²⁰ ns of time calls are timed in one: in the others the host comes ahead of a GPU again
_WARM = 3  # calls of a problem, or steps, after which nothing is compiled any more

Key = tuple[str, str, tuple[Any, ...]]


def key_of(choice: Choice) -> Key:
    """Op, problem and GPU model."""
    return choice.implementation.op.name, choice.problem.key, () if choice.gpu is None else choice.gpu.identity


def stamp(device: int | None) -> Any:
    """Now: on the GPU's current stream, or by the host's clock."""
    if device is None:
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Any, end: Any) -> float | None:
    """Milliseconds; None where the GPU has not come so far."""
    if isinstance(start, float):
        return 1e3 * float(end - start)
    return float(start.elapsed_time(end)) if end.query() else None


class _Thread(threading.local):
    """Is a call being timed? Whom was dispatch asked about last, that has not run since?"""

    busy = False
    looked: Choice | None = None


@dataclass
class _Noted:
    """A problem of which calls were timed: how many, how many of them did not make the GPU wait for the host, and
    (start, end, did it wait?) of the newest."""

    choice: Choice
    timed: int = 0
    free: int = 0
    samples: deque[tuple[Any, Any, bool]] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    follows: Key | None = None  # the forward problem, whose calls are counted for it

    def time_ms(self) -> tuple[float | None, bool]:
        """Milliseconds of a call, and whether the GPU waited in every sample: then it is the shortest."""
        kept = list(self.samples)[_WARM - 1 if _WARM < self.timed <= _SAMPLES else 0 :]
        read = [(ms, waited) for start, end, waited in kept if (ms := between(start, end)) is not None]
        free = [ms for ms, waited in read if not waited]
        if free or not read:
            return (statistics.median(free), False) if free else (None, False)
        return min(read)[0], True


@dataclass
class _Mark:
    """A moment of the program: on the GPU, on the host, and the steps and calls until then."""

    stamp: Any
    seconds: float
    steps: int
    counts: Counter[Key]


class Notes:
    """open: are calls timed now? capturing: so many graphs are being captured. more: calls that no choice counts."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self._begun, self.thread = begun, _Thread()
        self.reset()

    def reset(self) -> None:
        """As a new process. What a parent has noted is kept: its events are of a GPU that is out of reach here."""
        self._parents = vars(self).copy()
        self.open, self.capturing, self.more = True, 0, Counter[Key]()
        self.first: _Mark | None = None
        self._device: int | None = None
        self._spread = False
        self._noted: dict[Key, _Noted] = {}
        self._choices: dict[int, Choice] = {}
        self._marks: list[_Mark] = []
        self._steps, self._last = 0, 0.0

    def times(self, first: Any = None) -> bool:
        """Is a call with this tensor timed now?"""
        if (
            not self.open
            or self.thread.busy
            or self.capturing
            or (self._spread and time.perf_counter_ns() >> _SLICE & 3)
        ):
            return False
        return first is None or not (first.is_cuda and torch.cuda.is_current_stream_capturing())

    def timed(self, choice: Choice, first: torch.Tensor, run: Callable[[], Any]) -> Any:
        """What it returns, its time noted as a call's of this choice."""
        self.thread.busy = True
        try:
            device = first.get_device() if first.is_cuda else None
            start = stamp(device)
            outputs = run()
            with suppress(Exception):
                self.note(choice, start, device)
            return outputs
        finally:
            self.thread.busy = False

    def note(self, choice: Choice, start: Any, device: int | None, follows: Key | None = None) -> None:
        """A call of this choice ends here."""
        end = stamp(device)
        noted = self._noted.setdefault(key_of(choice), _Noted(choice))
        noted.choice, noted.follows, noted.timed = choice, follows, noted.timed + 1
        # Where the GPU is at the call's beginning before the host is at its end, it has waited in between.
        waited = not isinstance(start, float) and start.query()
        noted.free += not waited
        noted.samples.append((start, end, waited))
        self._spread = self._spread or (noted.timed > _WARM and device is not None)
        if self.first is None:
            self._device, self.first = device, _Mark(start, time.perf_counter(), self._steps, Counter())
            self._marks.append(self.first)
            self._begun()
        elif noted.timed == _WARM and not self._steps:
            self._mark()

    def enough(self) -> bool:
        """Has each problem of which calls were timed been timed often, and not only while a program warmed up?"""
        noted = list(self._noted.values())
        return bool(noted) and all(each.timed >= (_ENOUGH if each.free >= _FREE else _PATIENCE) for each in noted)

    def stepped(self, *_: Any) -> None:
        """An optimizer has taken a step. One that is compiled has no clock."""
        if torch.compiler.is_compiling():
            return
        self._steps += 1
        if (
            self.first is None
            or self.capturing
            or (self._device is not None and torch.cuda.is_current_stream_capturing())
        ):
            return
        with suppress(Exception):
            now = time.perf_counter()
            if self._steps == 1:
                del self._marks[1:]  # there is something better
            if now - self._last > 0.05 * (now - self.first.seconds):
                del self._marks[_WARM + 1 :]
                self._mark()

    def _mark(self) -> _Mark:
        self._last = time.perf_counter()
        self._marks.append(_Mark(stamp(self._device), self._last, self._steps, self.counts()))
        return self._marks[-1]

    def _met(self) -> list[Choice]:
        """All choices there have been, which have counted their calls."""
        dispatch.here._tell("counted")
        self._choices |= {id(choice): choice for choice in list(dispatch.here._memo.values())}
        return list(self._choices.values())

    def counts(self) -> Counter[Key]:
        """Calls until now."""
        found = Counter(self.more)
        for choice in self._met():
            found[key_of(choice)] += choice.calls
        return found

    def made(self) -> int:
        """How many calls there were until now."""
        return self.more.total() + sum(choice.calls for choice in self._met())

    def found(self) -> dict[str, Any]:
        """All of it, of the time from when the program was warm until its end, or its last step.

        Warm it is by the third step or, without steps, when the last of its problems is called for the third time;
        before half of its calls in any case. Dispatch's ledger is told what was measured.
        """
        assert self.first is not None
        end = self._marks[-1] if self._marks[-1].steps > _WARM else self._mark()
        half = end.counts.total() / 2
        begin = [each for each in self._marks[: _WARM + 1 if self._steps else None] if each.counts.total() <= half][-1]
        if not isinstance(end.stamp, float):
            end.stamp.synchronize()
        calls, whole = Counter({key: n - begin.counts[key] for key, n in end.counts.items()}), self.counts()
        for key, noted in list(self._noted.items()):
            if noted.follows is not None:
                share = noted.timed / self._noted[noted.follows].timed
                calls[key] += round(share * calls[noted.follows])
                noted.choice.calls += round(share * whole[noted.follows])
        chosen = {key_of(each): each for each in self._choices.values()}
        chosen |= {key: noted.choice for key, noted in list(self._noted.items())}
        rows = [self._row(key, chosen[key], count) for key, count in calls.items() if count > 0 and key in chosen]
        span_ms = between(begin.stamp, end.stamp) or 0.0
        return {"seconds": span_ms / 1e3, "steps": end.steps - begin.steps, "problems": rows}

    def _row(self, key: Key, choice: Choice, calls: int) -> dict[str, Any]:
        time_ms, waited = self._noted[key].time_ms() if key in self._noted else (None, False)
        ran, timed = choice.spare or choice, time_ms is not None
        if time_ms is not None:
            dispatch.here.measured[key[:2]] = time_ms
        elif choice.gpu is not None:
            time_ms = estimated_ms(choice.problem, choice.gpu)
        told = {"op": key[0], "problem": key[1], "gpu": key[2], "calls": calls, "time_ms": time_ms}
        how = {"timed": timed, "waited": waited, "served": ran.implementation.name, "source": ran.source}
        return told | how
