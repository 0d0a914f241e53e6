"""One problem that a running program settles: what is tried, how long it took, and what follows from that."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tilebook import device as devices
from tilebook import provenance
from tilebook import registry as store
from tilebook.device import Device
from tilebook.dispatch.choice import Choice, Outputs
from tilebook.dispatch.snapshot import pytorch
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.registry import Finalist, Speedup, Verdict, VerdictStatus

LOOKS = (8, 16, 32, 64)
"""Rounds after which the times are looked at. The error that is allowed for is that of all looks and candidates."""

_VERIFYING_S, _VERIFYING = 0.02, 50.0  # verifying costs about so much, and so many times the least time of a call
TURN_S = 50e-6  # what a call costs the host more than usual, beside what is timed here

_UNREAD = 64  # calls whose events have not come to pass
_WARM = 2  # calls of a candidate: the first loads, the second is recorded

Candidate = tuple[Implementation, Config | None]


class Gpu:
    """What is asked of the GPU and of the clock; tests have their own."""

    now = staticmethod(time.perf_counter)

    def event(self, like: torch.Tensor) -> Any:
        """One that the tensor's GPU reaches after what it has been given so far."""
        new: Any = torch.cuda.Event
        made = new(enable_timing=True)
        made.record(torch.cuda.current_stream(like.device))
        return made

    def room(self, like: torch.Tensor, size: float) -> bool:
        return torch.cuda.mem_get_info(like.device)[0] >= size

    @contextmanager
    def aside(self, like: torch.Tensor) -> Iterator[torch.device]:
        """Inside the block nothing waits for the program's stream, and nothing is recorded or cast."""
        new: Any = torch.cuda.Stream
        with torch.cuda.stream(new(like.device, priority=-1)), torch.no_grad(), torch._C._DisableAutocast():
            yield like.device


@dataclass(eq=False)
class Settling:
    """One problem until it is known what serves it. `active`: its calls are looked at; `done`: never again.

    rounds: ms by candidate, None for PyTorch's own, a dictionary a round. idle: calls that the GPU was waiting for.
    """

    op: Op[Any]
    problem: Problem
    gpu: Device
    alive: list[Candidate]
    compiled: dict[Candidate, Future[Any]] = field(default_factory=dict)
    active: bool = False
    done: bool = False
    verified: bool = False
    spent_s: float = 0.0
    looks: int = 0
    rounds: list[dict[Candidate | None, float]] = field(default_factory=list)
    idle: int = 0
    turns: list[Candidate | None] = field(default_factory=list)
    unread: deque[tuple[dict[Candidate | None, float], Candidate | None, Any, Any]] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tried = tuple(self.alive)

    @property
    def ready(self) -> bool:
        return not (self.active or self.done) and all(each.done() for each in self.compiled.values())

    @property
    def expected_s(self) -> float:
        """What the next step costs."""
        return TURN_S if self.verified else _VERIFYING_S + _VERIFYING * self.problem.floor_s(self.gpu)

    @property
    def whole(self) -> list[dict[Candidate | None, float]]:
        """The rounds of which all is known."""
        return [each for each in self.rounds if None in each and all(one in each for one in self.alive)]

    @property
    def own_ms(self) -> list[float]:
        """Times of PyTorch's own calls."""
        return [each[None] for each in self.rounds if None in each]

    def drop(self, candidate: Candidate) -> None:
        self.alive = [each for each in self.alive if each is not candidate]
        self.turns = [each for each in self.turns if each is not candidate]

    def _pairs(self, candidate: Candidate) -> list[tuple[float, float]]:
        """Times of PyTorch's own calls and of the candidate's, of the rounds that have both."""
        return [(each[None], each[candidate]) for each in self.rounds if None in each and candidate in each]

    def lead(self, candidate: Candidate) -> Speedup:
        """How many times as fast as PyTorch's own it is. Looks at all candidates together err in 5 % of problems."""
        from tilebook.tuner.judge.stats import speedup

        own, its = zip(*self._pairs(candidate), strict=True)
        found = speedup(own, its, level=100 - 5 / (len(LOOKS) * len(self.tried)))
        return Speedup(found.value, found.low, found.high)

    def verdict(self, winner: Candidate | None) -> Verdict:
        """What has been found: the winner, PyTorch's own if that is None, and all that was compared with it."""
        from tilebook.tuner.judge.stats import median

        ones = Speedup(1.0, 1.0, 1.0)
        own = Finalist("torch", {}, median(self.own_ms), ones, _rounded(self.own_ms))
        made: dict[Candidate | None, Finalist] = {None: own}
        for each in self.tried:
            its = [ms for _, ms in self._pairs(each)]
            if len(its) >= LOOKS[0]:
                config = dict(each[1] or {})
                made[each] = Finalist(each[0].name, config, median(its), self.lead(each), _rounded(its))
        first = made.pop(winner)
        told: dict[str, store.Json] = {
            "rounds": len(self.whole),
            "looks": self.looks,
            "idle": self.idle,
            "spent_ms": round(1e3 * self.spent_s, 3),
        }
        return Verdict(
            op=self.op.name,
            problem=self.problem.key,
            device=store.Device(*self.gpu.identity),
            environment=store.Environment(dict(devices.environment())),
            kernel=self.op.digest,
            status=VerdictStatus.MEASURED,
            finalists=(first, *made.values()),
            default_time_ms=own.time_ms,
            interval=first.speedup,
            mode="eager",
            sources={each.name: each.digest for each, _ in self.tried if each.digest},
            notes={"observed": told, "made": provenance.made()},
            origin="observed",
        )


def _rounded(samples_ms: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(each, 6) for each in samples_ms)


class Probe:
    """What stands in a choice's place while its problem is settled. Plans belong to the choice: so do candidates."""

    def __init__(self, prober: Any, state: Settling, choice: Choice) -> None:
        self.prober, self.state = prober, state
        self._choices: dict[Candidate | None, Choice] = {None: pytorch(state.op, state.problem, state.gpu)}
        for each in state.tried:
            self._choices[each] = Choice(*each, "nearest", state.problem, state.gpu, verified=True)

    @property
    def active(self) -> bool:
        return self.state.active

    def __call__(self, usual: Callable[..., Outputs], args: Sequence[Any]) -> Outputs:
        state, prober, outputs = self.state, self.prober, None
        if state.lock.acquire(blocking=False):  # else it is another thread's turn
            try:
                began, once = prober.gpu.now(), not prober.verified
                turn = self._next(args[0])
                prober.spend(state, prober.gpu.now() - began + TURN_S, once)
                if turn is not None:
                    outputs = self._take(*turn, args)
            except Exception:  # a fault of probing, which ends it; what is wrong with the call the usual one says
                state.active, state.done = False, True
            finally:
                state.lock.release()
        return usual(*args) if outputs is None else outputs

    def _next(self, like: torch.Tensor) -> tuple[Candidate | None, bool] | None:
        """Whose turn it is, and whether it is timed. None where the call is the usual one."""
        state, prober = self.state, self.prober
        try:
            prober.read(state)
            if not state.active or not prober.affords(state):
                return None
            if not state.verified:
                prober.verify(state, like)
        except Exception as broken:  # no memory, no NumPy, a mind of its own
            prober.end(state, broken)
        if not state.active or len(state.unread) >= _UNREAD:
            return None
        cold = next((each for each in state.alive if self._choices[each].calls < _WARM), None)
        if cold is not None:
            return cold, False
        if not state.turns:
            state.turns = prober.random.sample([None, *state.alive], 1 + len(state.alive))
            state.rounds.append({})
        return state.turns.pop(), True

    def _take(self, who: Candidate | None, timed: bool, args: Sequence[Any]) -> Outputs | None:
        """One call of the candidate, PyTorch's own where it is None; nothing where the candidate fails."""
        state, gpu = self.state, self.prober.gpu
        began, start = gpu.now(), gpu.event(args[0]) if timed else None
        try:
            outputs = self._choices[who].usual(*args)
        except Exception as broken:
            if who is not None:
                self.prober.drop(state, who, broken)
            return None  # which says what is wrong with the call, if anything is
        took_s = gpu.now() - began
        if start is None:
            self.prober.spend(state, took_s, once=True)
            return outputs
        if start.query():  # there is some of the host's time between the events
            state.idle += 1
            state.turns.append(who)
            self.prober.spend(state, took_s)
        else:
            state.unread.append((state.rounds[-1], who, start, gpu.event(args[0])))
        return outputs
