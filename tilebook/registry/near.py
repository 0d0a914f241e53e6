"""Where a problem lies among others, as text that a plain index sorts, and the search for the nearest by it.

A registry knows of a problem only its key, canonical JSON. What of it is an integer counts as a dimension, all else is
its *form*. Its *spot* interleaves the bits of the dimensions' logarithms (a Morton code), so that everything within a
cube of that space is one range of an index: the search goes from cube to cube, nearest first, and leaves out the rest.
Standard library only.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeGuard

from tilebook.registry.checks import Json, canonical

LEVELS = 14  # bits of a coordinate
STEPS = 256  # steps of a coordinate for each factor of two; 2**LEVELS / STEPS = 64 of them reach every integer
MOST_DIMENSIONS = 8  # the first by name; a distance over fewer is a lower bound still
LEAF = 64  # a cube of no more rows is read instead of divided
MOST_ALIKE = 256  # of those on one spot are looked at
MOST_CUBES = 48  # are opened in a search

SPOT = 2 * LEVELS
"""Characters of a spot."""

_LANE = (1 << LEVELS) - 1
_HALF = LEVELS // 2
_APART = [sum((step >> level & 1) << 8 * level for level in range(_HALF)) for step in range(1 << _HALF)]
"""For the bits of half a coordinate the same bits, a symbol's eight apart."""


class Index(Protocol):
    """Problems of one form, by their spots; a range of spots is [low, high)."""

    def span(self, low: str, high: str, most: int) -> tuple[str, str, bool] | None:
        """The first and the last spot of a range, and whether there are more than `most`; None where there is none."""

    def rows(self, low: str, high: str, most: int) -> Sequence[tuple[str, int]]:
        """(spot, number) of so many in a range; of a damaged row a text that is no spot."""

    def problem(self, number: int) -> str:
        """The problem that has this number; "" where there is none."""


@dataclass(frozen=True)
class Place:
    """A problem's place: its form, 16 hex digits; its dimensions' names and base-2 logarithms; its spot."""

    form: str
    names: tuple[str, ...]
    point: tuple[float, ...]

    @property
    def spot(self) -> str:
        """Two hex digits a level, the coarsest first: a bit of each dimension."""
        spot = 0
        for axis, each in enumerate(self.point):
            step = min(int(STEPS * each), _LANE)
            spot |= (_APART[step >> _HALF] << 8 * _HALF | _APART[step & (1 << _HALF) - 1]) << axis
        return f"{spot:0{SPOT}x}"


def is_spot(value: object) -> TypeGuard[str]:
    """Is it what `Place.spot` may be? A registry may be a stranger's, or damaged."""
    return isinstance(value, str) and len(value) == SPOT and _HEX.issuperset(value)


_HEX = frozenset("0123456789abcdef")


def place_of(problem: str) -> Place:
    """Raises ValueError where the text is not a JSON object."""
    values = json.loads(problem)
    if not isinstance(values, dict):
        raise ValueError("a problem is a JSON object")
    dimensions = {name: each for name, each in sorted(values.items()) if type(each) is int and each > 0}
    form: Json = [list(dimensions), {name: each for name, each in values.items() if name not in dimensions}]
    names = tuple(itertools.islice(dimensions, MOST_DIMENSIONS))
    digest = hashlib.sha256(canonical(form).encode()).hexdigest()[:16]
    return Place(digest, names, tuple(math.log2(dimensions[name]) for name in names))


class Near(NamedTuple):
    """A problem, its distance, and whether others may be as near, which have not come yet."""

    distance: float
    problem: str
    tied: bool


class Bounds(NamedTuple):
    """What is known of a distance before it is asked for.

    exact:  dimensions that must be the same. halved: those of whose difference it may count no more than half.
    reach:  the greatest that is wanted.
    """

    exact: frozenset[str]
    halved: frozenset[str]
    reach: float


def nearest(place: Place, bounds: Bounds, index: Index, distance: Callable[[str], float], most: int) -> Iterator[Near]:
    """The problems within reach of a place, nearest first; of two as near, by their text.

    distance: of a problem, never below the sum of its dimensions' differences, halved where they are.
    most: how many will be taken, mostly. With one, what is farther than the first that was met is looked for only when
    more are taken. Where so many cubes have been opened that looking for a nearer one costs more than it gains, those
    serve that were seen by then, in the same order.
    """
    told: set[str] = set()
    for narrowing in (True, False) if most == 1 else (False,):
        for each in _Search(place, bounds, index, distance, narrowing).found():
            if each.problem not in told:
                told.add(each.problem)
                yield each


_PARTS, _ROW, _KNOWN = range(3)  # of what is as near, first what may hide something nearer
_Waiting = tuple[float, int, str, int]
"""The least distance; which of the three; a problem; the number of a row, or of a divided cube's parts."""
_SLACK = 1e-9


class _Search:
    """narrowing: only what is no farther than the first problem that is looked at is found."""

    def __init__(
        self, place: Place, bounds: Bounds, index: Index, distance: Callable[[str], float], narrowing: bool
    ) -> None:
        mine = [min(STEPS * each, float(_LANE)) for each in place.point]
        exact = [name in bounds.exact for name in place.names]
        weights = [0.5 if name in bounds.halved else 1.0 for name in place.names]
        self._axes = list(zip(mine, exact, weights, _DIGITS, strict=False))
        self._reach = bounds.reach
        self._index, self._distance = index, distance
        self._narrowing = self._first = narrowing
        self._waiting: list[_Waiting] = []
        self._parts: list[tuple[str, list[tuple[float, int, int]]]] = []  # divided cubes and what of them is left

    def found(self) -> Iterator[Near]:
        waiting = self._waiting
        self._open("", 0)
        left = MOST_CUBES - 1
        while waiting:
            bound, kind, what, number = heapq.heappop(waiting)
            if bound > self._reach:
                return  # found before a nearer one was
            if kind == _KNOWN:
                yield Near(bound, what, bool(waiting) and waiting[0][0] <= bound)
            elif kind == _ROW:
                self._look_at(number)
            elif left:
                left -= 1
                cube, parts = self._parts[number]
                _, symbol, corner = parts.pop()
                self._wait_for(number)
                self._open(cube + _SYMBOLS[symbol], corner)

    def _look_at(self, number: int) -> None:
        problem = self._index.problem(number)
        if (found := self._distance(problem)) <= self._reach:
            heapq.heappush(self._waiting, (found, _KNOWN, problem, number))
            if self._narrowing:
                self._reach = found

    def _wait_for(self, number: int) -> None:
        """Until the nearest part of a divided cube that has not been opened may be the nearest of all."""
        if parts := self._parts[number][1]:
            heapq.heappush(self._waiting, (parts[-1][0] / STEPS - _SLACK, _PARTS, "", number))

    def _open(self, cube: str, corner: int) -> None:
        """Has what is in a cube wait, with a lower bound of its distance: rows, or its parts together.

        corner: in steps of the cube's own size, LEVELS bits for each dimension.
        """
        end = cube + "g"  # sorts after every hex digit
        if (span := self._index.span(cube, end, LEAF)) is None:
            return
        first, last, more = span
        shared = _shared(first, last)
        if more and shared < SPOT:  # else all of them lie on one spot
            parts = self._divided(shared, _within(corner, last[len(cube) : shared]))
            self._parts.append((last[:shared], sorted(parts, reverse=True)))
            self._wait_for(len(self._parts) - 1)
            return
        found = self._index.rows(cube, end, MOST_ALIKE)
        bounds = ((self._bound(spot), number) for spot, number in found)
        rows = [(bound, _ROW, "", number) for bound, number in bounds if bound is not None]
        if rows and self._first:
            self._first = False
            rows.sort(reverse=True)
            self._look_at(rows.pop()[3])
        for row in rows:
            if row[0] <= self._reach:
                heapq.heappush(self._waiting, row)

    def _bound(self, spot: str) -> float | None:
        """The least distance of a row's problem; None where that is out of reach, or the row is damaged."""
        total, reach = 0.0, STEPS * (self._reach + _SLACK)
        try:
            symbols = bytes.fromhex(spot)
        except ValueError:
            return None
        if len(symbols) != LEVELS:
            return None
        for mine, exact, weight, digits in self._axes:
            low = int(symbols.translate(digits), 2)
            if (off := low - mine if mine < low else mine - low - 1) > 0:
                total += weight * off
                if exact or total > reach:
                    return None
        return total / STEPS - _SLACK

    def _divided(self, length: int, corner: int) -> list[tuple[float, int, int]]:
        """The parts of a cube whose spot has this length that reach into where the search reaches: their distances,
        symbols and corners."""
        size, reach = 1 << LEVELS - 1 - length // 2, STEPS * (self._reach + _SLACK)
        parts = [(0.0, 0, 0)]
        for axis, (mine, exact, weight, _) in enumerate(self._axes):
            sides = []
            for bit in (0, 1):
                step = (corner >> LEVELS * axis & _LANE) << 1 | bit
                low = step * size
                off = low - mine if mine < low else max(mine - low - size, 0.0)
                if not (exact and off):
                    sides.append((weight * off, bit << axis, step << LEVELS * axis))
            parts = [
                (far + off, symbol | bit, inner | step)
                for far, symbol, inner in parts
                for off, bit, step in sides
                if far + off <= reach
            ]
        return parts


_SYMBOLS = [f"{symbol:02x}" for symbol in range(256)]
_DIGITS = [bytes(48 + (symbol >> axis & 1) for symbol in range(256)) for axis in range(MOST_DIMENSIONS)]
_SPREAD = [sum((symbol >> axis & 1) << LEVELS * axis for axis in range(MOST_DIMENSIONS)) for symbol in range(256)]


def _shared(one: str, other: str) -> int:
    """How long the symbols are that both begin with."""
    apart = (int(one, 16) ^ int(other, 16)).bit_length()
    return 2 * (LEVELS - (apart + 7) // 8)


def _within(corner: int, symbols: str) -> int:
    """The corner of a cube inside another."""
    for symbol in bytes.fromhex(symbols):
        corner = corner << 1 | _SPREAD[symbol]
    return corner


@lru_cache(1_024)  # one problem has verdicts on many GPUs
def position_columns(problem: str) -> Mapping[str, str]:
    """The columns of a verdict's position that depend on its problem."""
    place = place_of(problem)
    return {"form": place.form, "spot": place.spot}
