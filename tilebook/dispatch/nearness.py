"""Which verdicts are near a problem, and how near."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tilebook.op import Op, Problem
from tilebook.registry.serving import Served

FARTHEST = 8.0
"""A verdict serves problems up to this distance: a factor of 256 in one dimension, or less in several."""


def nearest(problem: Problem, known: Sequence[tuple[Served, Problem]]) -> Iterator[Served]:
    """The verdicts of `by_distance`, which are only looked for when the first is asked for."""
    for _, _, verdict in by_distance(problem, known):
        yield verdict


def by_distance(problem: Problem, known: Sequence[tuple[Served, Problem]]) -> list[tuple[float, bool, Served]]:
    """The verdicts on other problems that are near enough, nearest first, measurements first of two as near."""
    found = [(problem.distance(p), not v.measured, v) for v, p in known if v.problem != problem.key]
    return sorted((each for each in found if each[0] <= FARTHEST), key=order)


def unlike(op: Op[Any], problem: Problem, key: str) -> tuple[float, float]:
    """In how many flags and names another problem differs, and how far its sizes are apart."""
    try:
        other = op.problem.from_key(key)
    except (TypeError, ValueError, RecursionError):
        return math.inf, math.inf
    named = [each.name for each in problem._fields() if "letter" not in each.metadata]
    return sum(getattr(problem, name) != getattr(other, name) for name in named), problem.apart(other)


def order(near: tuple[float, bool, Served]) -> tuple[float, bool, str]:
    return *near[:2], near[2].problem


def away(op: Op[Any], problem: Problem, key: str) -> float:
    """The distance of a problem that is known by its key; infinite where that is none."""
    try:
        return problem.distance(op.problem.from_key(key))
    except (TypeError, ValueError, RecursionError):
        return math.inf
