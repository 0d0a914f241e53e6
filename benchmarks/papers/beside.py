"""What the programs of this folder have in common: arguments, tables beside a paper's, JSON and plots."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tilebook import device as devices

sys.path.insert(0, str(Path(__file__).parents[1]))

from compare import arguments as arguments
from compare import save

LOST = 0.3
"""Points of accuracy that a way may lose; or two standard errors, if these are more."""

STARTED = time.monotonic()


def over(given: argparse.Namespace) -> bool:
    """Is the time of this run over?"""
    return time.monotonic() - STARTED > given.seconds


def keep(given: argparse.Namespace, name: str, **figures: Any) -> None:
    save(given.out, name, devices.current().name if given.device == "cuda" else "cpu", tiny=given.tiny, **figures)


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it finds, or why it failed; afterwards the GPU's memory is free again."""
    try:
        return call()
    except Exception as broken:
        return {"failed": f"{type(broken).__name__}: {broken}"[:300]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def apart(found: dict[str, list[float]], put_in: dict[str, float]) -> list[dict[str, Any]]:
    """Of accuracies by way and seed the mean, and how far it is from PyTorch's in the seeds that both have."""
    rows = []
    for name, each in found.items():
        pairs = [a - b for a, b in zip(each, found["pytorch"], strict=False)]
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
        row = {"way": name, "accuracy": each, "mean": statistics.fmean(each), "put_in": put_in.get(name)}
        difference = statistics.fmean(pairs)
        rows.append(
            row | {"difference": difference, "error": error, "kept": difference >= -max(LOST, 2 * (error or 0))}
        )
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """As markdown; None is a dash."""

    def cell(value: Any) -> str:
        return "—" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
