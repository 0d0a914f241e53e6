"""What calls from Python take, host included, in rounds in which several contenders take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tilebook.tuner.judge.measure import timed_ms


def in_turns(running: dict[str, Callable[[], Any]], rounds: int, calls: int, device: str) -> dict[str, dict[str, Any]]:
    """ms a call of each and its quartiles, of rounds that another one begins each time."""
    series: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for turn in range(rounds + 1):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            taken = time_ms(running[name], calls, device)
            if turn:  # the first round warms up
                series[name].append(taken)
    found = {}
    for name, samples in series.items():
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        found[name] = {"ms": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}
    return found


def time_ms(run: Callable[[], Any], calls: int, device: str) -> float:
    """Milliseconds of a call, by events around several; by the clock on the CPU."""

    def several() -> None:
        for _ in range(calls):
            run()

    if device == "cuda":
        return timed_ms(several) / calls
    start = time.perf_counter()
    several()
    return (time.perf_counter() - start) / calls * 1e3


def peak_mib(run: Callable[[], Any], device: str) -> float | None:
    """Memory above what the inputs take; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
