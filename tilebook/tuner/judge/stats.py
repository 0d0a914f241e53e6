"""The statistics of a verdict: paired log-ratios with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000

PROMOTION = 1.01
"""What is to replace another must beat it by this factor at the lower end of its interval."""


@dataclass(frozen=True)
class Ratio:
    """A speed-up (baseline time over candidate time) with its interval, of 95 % where no other is asked for."""

    value: float
    low: float
    high: float


def speedup(baseline_ms: Sequence[float], candidate_ms: Sequence[float], seed: int = 0, level: float = 95.0) -> Ratio:
    """Median of the per-round ratios of two interleaved series, with a percentile bootstrap over the rounds.

    level: how sure the interval is, in percent.
    """
    logs = np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms))
    picks = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.percentile(np.median(logs[picks], axis=1), [50 - level / 2, 50 + level / 2])
    return Ratio(*(float(np.exp(value)) for value in (np.median(logs), low, high)))


def median(samples: Sequence[float]) -> float:
    return float(np.median(samples))
