"""The statistics of a verdict: paired log-ratios with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A speed-up (baseline time over candidate time) with its 95 % interval."""

    value: float
    low: float
    high: float


def speedup(baseline_ms: Sequence[float], candidate_ms: Sequence[float], seed: int = 0) -> Ratio:
    """Median of the per-round ratios of two interleaved series, with a percentile bootstrap over the rounds."""
    logs = np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms))
    picks = np.random.default_rng(seed).integers(0, len(logs), (RESAMPLES, len(logs)))
    low, high = np.percentile(np.median(logs[picks], axis=1), [2.5, 97.5])
    return Ratio(*(float(np.exp(value)) for value in (np.median(logs), low, high)))


def median(samples: Sequence[float]) -> float:
    return float(np.median(samples))
