"""Where problems lie, and the nearest of them: what the index finds is what looking at each of them finds."""

from __future__ import annotations

import bisect
import itertools
import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from tilebook.registry import canonical
from tilebook.registry.near import LEAF, LEVELS, MOST_CUBES, Bounds, nearest, place_of


def sized(**sizes: Any) -> str:
    return canonical({"causal": True, "dtype": "bf16", **sizes})


def distance(key: str, other: str, exact: frozenset[str] = frozenset({"width"})) -> float:
    """As problems have it: the dimensions are their integers."""
    mine, theirs = json.loads(key), json.loads(other)
    total = 0.0
    for name, value in mine.items():
        if value != theirs.get(name):
            if type(value) is not int or type(theirs.get(name)) is not int or name in exact:
                return math.inf
            total += abs(math.log2(value / theirs[name]))
    return total if mine.keys() == theirs.keys() else math.inf


class Index:
    """What a table with an index answers, and how often it is asked."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys
        self.entries = sorted((place_of(key).form, place_of(key).spot, n) for n, key in enumerate(keys))
        self.form = ""
        self.opened = self.read = self.asked = 0

    def span(self, low: str, high: str, most: int) -> tuple[str, str, bool] | None:
        self.opened += 1
        found = self._between(low, high)
        return (found[0][0], found[-1][0], len(found) > most) if found else None

    def rows(self, low: str, high: str, most: int) -> Sequence[tuple[str, int]]:
        found = self._between(low, high)[:most]
        self.read += len(found)
        return found

    def problem(self, number: int) -> str:
        self.asked += 1
        return self.keys[number]

    def _between(self, low: str, high: str) -> Sequence[tuple[str, int]]:
        start, end = (bisect.bisect_left(self.entries, (self.form, spot)) for spot in (low, high))
        return [(spot, number) for _, spot, number in self.entries[start:end]]


def near(index: Index, key: str, most: int, reach: float = 8.0, said: int | None = None) -> list[tuple[float, str]]:
    """So many, of a search that was told that it would be asked for `said`."""
    place = place_of(key)
    index.form = place.form
    bounds = Bounds(frozenset({"width"}), frozenset(), reach)
    found = nearest(place, bounds, index, lambda other: distance(key, other), said or most)
    return [each[:2] for each in itertools.islice(found, most)]


def shapes(dice: random.Random, many: int) -> list[str]:
    def size() -> int:
        return dice.choice([1 << dice.randrange(16), dice.randrange(1, 60_000), 3])

    def shape() -> str:
        width, causal = dice.choice([64, 128]), dice.random() < 0.5
        return sized(batch=size(), rows=size(), width=width, causal=causal)

    return sorted({shape() for _ in range(many)})


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_are_those_that_looking_at_each_finds(seed: int) -> None:
    dice = random.Random(seed)
    keys = shapes(dice, 600)
    index = Index(keys)
    for key in shapes(dice, 40):
        found = sorted((far, other) for other in keys if (far := distance(key, other)) <= 8.0)
        assert near(index, key, 5) == near(index, key, 5, said=1) == found[:5]
        assert near(index, key, 1) == found[:1]


def test_of_those_that_are_as_near_as_the_nearest_all_come_at_once() -> None:
    keys = [sized(batch=4 << n, rows=4 << 3 - n, width=64) for n in range(4)] + [sized(batch=64, rows=64, width=64)]
    index = Index(keys)
    key = sized(batch=4, rows=4, width=64)
    assert near(index, key, 4, said=1) == [(3.0, each) for each in sorted(keys[:4])]
    index.opened = index.asked = 0
    assert near(index, key, 1) == [(3.0, min(keys[:4]))]
    assert (index.opened, index.asked) == (1, 4)


def test_of_many_problems_few_are_looked_at() -> None:
    dice = random.Random(4)
    index = Index(shapes(dice, 20_000))
    for key in shapes(dice, 50):
        index.opened = index.read = index.asked = 0
        near(index, key, 1)
        assert index.opened <= 60
        assert index.read <= 16 * LEAF
        assert index.asked <= 8


def test_as_many_cubes_are_opened_as_one_may_wait_for() -> None:
    keys = [sized(**{f"d{n}": 1 << dice.randrange(60) for n in range(8)}) for dice in map(random.Random, range(4_000))]
    index = Index(keys)
    near(index, sized(**dict.fromkeys([f"d{n}" for n in range(8)], 1 << 30)), 10_000, reach=1_000.0)
    assert index.opened == MOST_CUBES


def test_problems_on_one_spot_are_all_found() -> None:
    keys = [sized(rows=(1 << 40) + n, width=64) for n in range(3 * LEAF)]
    assert len({place_of(key).spot for key in keys}) == 1
    assert len(near(Index(keys), keys[7], 1_000)) == len(keys)
    more = Index([sized(rows=(1 << 40) + n, width=64) for n in range(9 * LEAF)])
    assert len(near(more, keys[7], 1_000)) == more.read < 9 * LEAF


@pytest.mark.parametrize(
    "other", [{"rows": 0}, {"rows": -5}, {"rows": True}, {"rows": 1 << 70}, {"rows": 1.5}, {"rows": None}, {}], ids=str
)
def test_what_is_no_dimension_and_what_is_huge_has_a_place_too(other: dict[str, Any]) -> None:
    place = place_of(canonical({"width": 64, **other}))
    assert (len(place.form), len(place.spot)) == (16, 2 * LEVELS)
    assert place.names == (("rows", "width") if other == {"rows": 1 << 70} else ("width",))


def test_more_dimensions_than_a_spot_has_bits_for_are_left_out_of_it() -> None:
    keys = [sized(**{**{f"d{n:02}": 4 for n in range(11)}, "d10": size}) for size in (4, 8, 64)]
    assert len({place_of(key).spot for key in keys}) == 1
    assert near(Index(keys), keys[0], 3) == [(0.0, keys[0]), (1.0, keys[1]), (4.0, keys[2])]


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "{"])
def test_what_is_no_object_has_no_place(text: str) -> None:
    with pytest.raises(ValueError, match=r"object|Expecting"):
        place_of(text)
