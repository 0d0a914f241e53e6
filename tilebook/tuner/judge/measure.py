"""How long a candidate takes: samples over inputs rotated through several times the L2 cache."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tilebook.replay import Plan, record
from tilebook.tuner.judge.stats import median

SAMPLE_MS = 1.0
"""A sample holds enough launches to last about this long, so that the event clock's step does not matter."""

ROTATION = 3
"""Inputs are rotated through at least this many times the size of the L2 cache."""

Mode = Literal["graph", "eager"]
"""graph: launches replayed from a CUDA graph, the GPU's own time. eager: calls one after the other as a program makes
them, so that what a call costs the host counts wherever the GPU would wait for it."""

_GLANCES = 3
_HOST_MS = 1.0  # an eager launch that takes longer than this is the GPU's work, not the host's
_MOST_COPIES = 64
_MOST_LAUNCHES = 200

Call = Callable[..., Any]


def timed_ms(work: Callable[[], Any]) -> float:
    """By events on the GPU."""
    make: Any = torch.cuda.Event
    start, end = make(enable_timing=True), make(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@dataclass(frozen=True)
class Sampler:
    """One candidate, ready to be timed: `go` starts `launches` of its calls."""

    go: Callable[[], Any]
    launches: int

    def sample(self) -> float:
        """ms a call."""
        return timed_ms(self.go) / self.launches

    def samples(self, n: int) -> list[float]:
        return [self.sample() for _ in range(n)]


class Bench:
    """Times candidates on copies of one problem's inputs."""

    def __init__(self, inputs: tuple[Any, ...], l2_bytes: int, mode: Mode = "graph") -> None:
        size = sum(a.numel() * a.element_size() for a in inputs if isinstance(a, torch.Tensor))
        copies = min(_MOST_COPIES, max(1, math.ceil(ROTATION * l2_bytes / max(size, 1))))
        self.inputs = [tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in inputs) for _ in range(copies)]
        self._mode = mode
        stream: Any = torch.cuda.Stream
        self._stream = stream() if mode == "graph" else None
        self._first: Any = None

    def estimate(self, call: Call) -> float:
        """A first idea of ms a call, from three samples. `call` must have run before."""
        eager = self._eager(call, 1).samples(_GLANCES)
        if self._mode == "eager":
            return median(eager)
        # Host cost is part of an eager time; where it may be most of it, a small graph tells them apart.
        return min(eager) if min(eager) > _HOST_MS else median(self._graph(call, _GLANCES).samples(_GLANCES))

    def capture(self, call: Call, estimate_ms: float) -> Sampler:
        """Enough launches for one sample. `call` must have run before: nothing may compile during capture."""
        wanted = math.ceil(SAMPLE_MS / max(estimate_ms, 1e-4))
        launches = max(1, min(_MOST_LAUNCHES, max(wanted, len(self.inputs) if wanted > 1 else 1)))
        return self._eager(call, launches) if self._mode == "eager" else self._graph(call, launches)

    def _eager(self, call: Call, launches: int) -> Sampler:
        if self._mode == "eager" and self.inputs[0][0].is_cuda:
            # What dispatch runs from the third call on; the launcher's own host code costs several times as much.
            with torch.no_grad():
                _, plan = record(call, self.inputs[0])
            call = call if plan is None else _planned(plan)
        rotated = itertools.cycle(self.inputs)

        def go() -> None:
            with torch.no_grad():
                for inputs in itertools.islice(rotated, launches):
                    call(*inputs)

        return Sampler(go, launches)

    def _graph(self, call: Call, launches: int) -> Sampler:
        """All graphs share the memory of the first, which lives as long: no graph needs what another left in it.

        Each would keep a pool of its own, and what is left in those cannot be given back while the next is captured.
        """
        if self._first is None:
            self._first = self._captured(lambda *inputs: torch.zeros_like(inputs[0]), 1, None)
        try:
            graph = self._captured(call, launches, self._first.pool())
        except Exception:
            self._first = None  # PyTorch may take its pool for one that is still captured into
            raise
        sampler = Sampler(graph.replay, launches)
        sampler.samples(2)  # the first replay uploads the graph
        return sampler

    def _captured(self, call: Call, launches: int, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.stream(self._stream):
            graph.capture_begin(pool=pool)
            try:
                for index in range(launches):
                    call(*self.inputs[index % len(self.inputs)])
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph


def _planned(plan: Plan) -> Call:
    return lambda *inputs: plan(inputs)


def interleave(samplers: Sequence[Sampler], rounds: int, seed: int) -> list[list[float]]:
    """One sample of each candidate a round, in a new random order each round: drift and neighbours cancel in ratios."""
    order = random.Random(seed)
    samples: list[list[float]] = [[] for _ in samplers]
    for _ in range(rounds):
        for index in order.sample(range(len(samplers)), len(samplers)):
            samples[index].append(samplers[index].sample())
    return samples
