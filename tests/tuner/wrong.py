"""Candidates that are wrong in twelve ways, made of a few primitives, so that they exist in PyTorch and in Triton."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from injected import Candidate, Pair

from tilebook.tuner.judge.verify import SEEDS

ROWS, WIDTH, COUNT = 64, 48, 20
"""Of the tuned problem, and how many candidates of a kind there are."""

RUN_SEED = 0
RACE = 0.1


class Primitives(Protocol):
    """What candidates do to memory, in elements of contiguous tensors; `n` picks a variant of equal meaning."""

    def write(self, out: Any, x: Any, factor: float, n: int, first: int = 0, last: int | None = None) -> None:
        """out[i] = factor · x[i] for first ≤ i < last (all), even where those lie outside."""

    def add(self, out: Any, x: Any, factor: float, n: int) -> None:
        """out[i] += factor · x[i]"""

    def race(self, out: Any, at: int) -> None:
        """out[at] += 1, with probability RACE."""

    def spoil_if(self, out: Any, x: Any, first: float) -> None:
        """out[0] += 1 where x[0] is `first`."""

    def overflow(self, out: Any, x: Any, n: int) -> None:
        """out[i] += e − e for e = exp(2 x[i]) in fp32"""


@functools.cache
def _seed_of_the_finals() -> int:
    """The first seed that `final_cases` draws."""
    return random.Random(f"finals {RUN_SEED}").randrange(1000, 1 << 30)


@functools.cache
def _first_element(seed: int, rows: int, device: torch.device) -> float:
    return float(Pair(rows, WIDTH, 0).inputs(device, seed)[0][0, 0].item())


def candidates(do: Primitives) -> tuple[Candidate, Mapping[str, Candidate]]:
    """The right candidate, and the wrong ones by kind."""
    kept: dict[Any, Any] = {}

    def empty(x):
        return torch.empty_like(x), torch.empty_like(x)

    def good(x, n):
        y, z = empty(x)
        do.write(y, x, 3, n)
        do.write(z, x, 5, n)
        return y, z

    def no_write(x, n):
        y, z = empty(x)
        do.write((y, z)[n % 2], x, (3, 5)[n % 2], n)
        return y, z

    def half_write(x, n):
        y, z = empty(x)
        do.write(y, x, 3, n, last=x.numel() * (n + 1) // (COUNT + 1))
        do.write(z, x, 5, n)
        return y, z

    def stale_buffer(x, n):
        """Right the first time a shape comes by; then the buffer of that time again, half of it or none rewritten."""
        key = "stale", n, x.shape
        if key not in kept:
            kept[key] = good(x, n)
        elif n % 2:
            do.write(kept[key][0], x, 3, n, last=x.numel() // 2)
            do.write(kept[key][1], x, 5, n)
        return kept[key]

    def accumulate(x, n):
        """Adds up in memory that nobody has cleared, or that was cleared the first time."""
        y, z = empty(x)
        do.write(z, x, 5, n)
        if n % 2:
            key = "sum", n, x.shape
            y = kept.setdefault(key, torch.zeros_like(x) if key not in kept else None)
        do.add(y, x, 3, n)
        return y, z

    def wrong_on_ragged_shapes(x, n):
        y, z = good(x, n)
        if x.shape[0] % 8:
            do.write(y, x, 0 if n % 2 else 3.5, n, first=x.numel() - n - 1)
        return y, z

    def wrong_on_larger_shapes(x, n):
        """As if the grid were made for the tuned shape."""
        if x.shape[0] <= ROWS or x.shape[0] % 8:
            return good(x, n)
        y, z = empty(x)
        do.write(y, x, 3, n, last=ROWS * WIDTH + n)
        if n % 2:
            do.write(y, x, 0, n, first=ROWS * WIDTH + n)
        do.write(z, x, 5, n)
        return y, z

    def wrong_on_one_seed(x, n):
        y, z = good(x, n)
        seed = (*SEEDS, _seed_of_the_finals())[n % 3]
        do.spoil_if(y, x, _first_element(seed, ROWS, x.device))
        return y, z

    def racy(x, n):
        y, z = good(x, n)
        do.race(y, n)
        return y, z

    def out_of_bounds(x, n):
        y, z = good(x, n)
        if n % 2:
            do.write(y, x, 3, n, first=-1, last=1)
        else:
            do.write(z, x, 5, n, first=x.numel() - 1, last=x.numel() + 1)
        return y, z

    def mutated_input(x, n):
        y, z = good(x, n)
        do.write(x, x, 1.5, n, first=n, last=n + 1)
        return y, z

    def swapped_outputs(x, n):
        y, z = good(x, n)
        return z, y

    def nan_for_large_values(x, n):
        y, z = good(x, n)
        do.overflow((y, z)[n % 2], x, n)
        return y, z

    wrong = (
        no_write,
        half_write,
        stale_buffer,
        accumulate,
        wrong_on_ragged_shapes,
        wrong_on_larger_shapes,
        wrong_on_one_seed,
        racy,
        out_of_bounds,
        mutated_input,
        swapped_outputs,
        nan_for_large_values,
    )
    return good, {each.__name__: each for each in wrong}


KINDS = (
    "no_write",
    "half_write",
    "stale_buffer",
    "accumulate",
    "wrong_on_ragged_shapes",
    "wrong_on_larger_shapes",
    "wrong_on_one_seed",
    "racy",
    "out_of_bounds",
    "mutated_input",
    "swapped_outputs",
    "nan_for_large_values",
)
SELDOM = ("wrong_on_one_seed", "racy")
"""The kinds that a trial may get past: what it must not do is to become a verdict."""
