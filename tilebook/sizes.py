"""Sizes of a graph that are not known while it is compiled: symbols, and what can be said whatever they are."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

TRIED = (*range(2, 18), 31, 32, 33, 64, 65)
"""What unknown sizes are taken for, beside those that they have now."""

_SMALL, _STEP = 4, 1
"""Numbers written into a graph, at most: axes and their places, and what is added to places or compared with them."""

_SIZED: set[Any] = {
    torch.arange, torch.ones, torch.zeros, torch.full, "expand", "new_ones", "new_zeros", "new_full", "reshape", "view",
    "repeat",
}  # fmt: skip
"""What takes sizes, which are any numbers."""

_AXES: set[Any] = {
    operator.getitem, "__getitem__", torch.cat, torch.stack, torch.diff, torch.cumsum, "cumsum", "diff", "flatten",
    "permute", "squeeze", "transpose", "unsqueeze", "to", "type",
}  # fmt: skip


class Unknown(Exception):
    """Numbers that are not known before the program runs."""


@dataclass(frozen=True)
class Trial:
    """Numbers for the sizes of a graph: given to its placeholders, and to the symbols of which sizes are made."""

    given: Mapping[Node, Callable[[], Any]]
    values: Mapping[Any, int]

    def of(self, size: Any) -> int:
        """Raises Unknown for one that is made of other symbols."""
        if type(size) is int:
            return size
        found = size.subs(self.values)
        if not found.is_number:
            raise Unknown
        return int(found)


def size(n: Any) -> Any:
    """A size as it can be compared without a guard: a number, or an expression of symbols."""
    return n if type(n) is int else n.node.expr


def hinted(sizes: Iterable[Any]) -> float:
    """The product of sizes as they are now."""
    return math.prod(n if type(n) is int else n.node.hint for n in sizes)


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Have these the same sizes? Those of different inputs, which are different symbols, where they are equal now."""
    pairs: list[tuple[Any, Any]] = list(zip(one.shape, other.shape, strict=False))
    return len(one.shape) == len(other.shape) and all(
        size(n) == size(m) or (type(n) is not int and type(m) is not int and n.node.hint == m.node.hint is not None)
        for n, m in pairs
    )


def trials(graph: Graph) -> list[Trial]:
    """The sizes that a graph has now, and others that it may have; none where sizes are made of more than is told."""
    values = {each: each.meta.get("example_value") for each in graph.nodes if each.op == "placeholder"}
    symbolic = {place: value.node for place, value in values.items() if isinstance(value, torch.SymInt)}
    now = {node.expr: node.hint for node in symbolic.values() if node.expr.is_symbol}
    symbols = {symbol for node in symbolic.values() for symbol in node.expr.free_symbols}
    if symbols != {*now} or None in now.values():
        return []
    several = [{symbol: n + 3 * i for i, symbol in enumerate(now)} for n in TRIED] if now else []
    return [
        Trial({place: _number(int(node.expr.subs(each))) for place, node in symbolic.items()}, each)
        for each in (now, *several)
    ]


def _number(n: int) -> Callable[[], Any]:
    return lambda: n


def regular(nodes: Iterable[Node]) -> bool:
    """Are numbers written into these nodes so small that what holds for all sizes tried holds for larger ones?

    A window of 4,096 is nothing that is seen of fewer columns.
    """
    for node in nodes:
        if node.op == "placeholder" or node.target in _SIZED:
            continue
        found: list[Any] = []
        map_aggregate((node.args, dict(node.kwargs)), found.append)
        most = _SMALL if node.target in _AXES else _STEP
        if any(isinstance(each, int | float | complex) and not abs(each) <= most for each in _flat(found)):
            return False
    return True


def _flat(found: Iterable[Any]) -> Iterable[Any]:
    for each in found:
        yield from (each.start, each.stop, each.step) if isinstance(each, slice) else (each,)
