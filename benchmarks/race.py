"""Times calls against each other: replayed from CUDA graphs, and as eager calls with the host's cost."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from yardsticks import Inputs

Step = Callable[[Inputs], Any]
Series = dict[str, list[float]]

SAMPLE_MS = 1.0
"""A sample from a graph holds enough launches to last about this long."""

EAGER_MS = 3.0
"""A sample of eager calls lasts about this long."""

ROTATION = 3
"""Inputs are rotated through at least this many times the L2 cache."""

_MOST_COPIES, _MOST_LAUNCHES = 64, 100


def around(step: Step) -> Any:
    """The context in which a step's calls are made, if it has one: a program enters that once, not for each call."""
    return getattr(step, "around", nullcontext)()


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage collector stays out of the times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Clock:
    """Times steps on one device. On the CPU, where programs are only tried, a graph is a row of calls."""

    def __init__(self, device: str, l2_bytes: int) -> None:
        self.device, self._l2 = device, l2_bytes
        self._stream: Any = torch.cuda.Stream() if device == "cuda" else None

    def rotated(self, given: Inputs) -> list[Inputs]:
        """The inputs and as many copies as it takes that none is still in the L2 cache when its turn comes."""
        copies = min(_MOST_COPIES, math.ceil(ROTATION * self._l2 / max(1, given.bytes))) if self.device == "cuda" else 2
        return [given, *(given.copy() for _ in range(copies - 1))]

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _ms(self, work: Callable[[], Any]) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def estimate(self, step: Step, given: Inputs) -> float:
        """ms a call, once it has run often enough that nothing is compiled, loaded or tried out any more."""
        with around(step):
            for _ in range(4):
                step(given)
            return min(self._ms(lambda: step(given)) for _ in range(3))

    def graph(
        self, step: Step, sets: Sequence[Inputs], launches: int, pool: Any = None
    ) -> tuple[Callable[[], Any], Any]:
        """(what replays `launches` calls over the rotated inputs, the pool of its memory)."""
        if self.device != "cuda":
            return lambda: [step(sets[n % len(sets)]) for n in range(launches)], None
        captured = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream), around(step):
            step(sets[0])
            torch.cuda.synchronize()
            captured.capture_begin(*[] if pool is None else [pool])
            try:
                for n in range(launches):
                    step(sets[n % len(sets)])
            finally:
                captured.capture_end()
        captured.replay()
        torch.cuda.synchronize()
        return captured.replay, captured.pool()

    def replayed(self, steps: dict[str, Step], sets: Sequence[Inputs], rounds: int) -> Series:
        """ms a call of each, replayed in a new random order each round; all with as many launches in a graph."""
        fastest = min(self.estimate(step, sets[0]) for step in steps.values())
        launches = max(1, min(_MOST_LAUNCHES, math.ceil(SAMPLE_MS / max(fastest, 1e-3))))
        replays: dict[str, Callable[[], Any]] = {}
        pool: Any = None
        for name, step in steps.items():
            try:
                replays[name], pool = self.graph(step, sets, launches, pool)
            except Exception as broken:  # what cannot be captured takes no part; PyTorch may hold its pool for taken
                print(f"{name} cannot be captured: {type(broken).__name__}: {broken}"[:300], flush=True)
                pool = None
        return self._interleaved(replays, rounds, lambda go: self._ms(go) / launches)

    def eager(self, steps: dict[str, Step], sets: Sequence[Inputs], rounds: int) -> Series:
        """ms a call of each as a program makes them, one after the other and without waiting, until all are done."""
        slowest = max(self.estimate(step, sets[0]) for step in steps.values())
        calls = max(2, min(200, math.ceil(EAGER_MS / max(slowest, 1e-3))))

        def seconds(step: Step) -> float:
            with around(step):
                step(sets[0])  # as it has been running: what another left in the caches is gone
                self.synchronize()
                start = time.perf_counter()
                for n in range(calls):
                    step(sets[n % len(sets)])
                self.synchronize()
                return (time.perf_counter() - start) * 1e3 / calls

        return self._interleaved(steps, rounds, seconds)

    def _interleaved(self, running: dict[str, Any], rounds: int, sample: Callable[[Any], float]) -> Series:
        order, series = random.Random(0), {name: list[float]() for name in running}
        with uncollected():
            for name in running:
                sample(running[name])
            for _ in range(rounds):
                for name in order.sample(list(running), len(running)):
                    series[name].append(sample(running[name]))
        return series


def quartiles(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in statistics.quantiles(values, n=4, method="inclusive")]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quartiles of the ratio of a round's two times."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)])
