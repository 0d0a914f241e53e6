"""A function's code with others among its globals, for one model alone: nobody else's globals change."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

from tilebook.trial import Function


def calls(function: Any, name: str) -> bool:
    """Does its code, whatever is wrapped around it, call something by this name?"""
    return name in getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())


def called(function: Any, name: str) -> Any:
    """What its code finds by this name now."""
    return _globals(function).get(name)


@functools.cache
def _globals(function: Any) -> Mapping[str, Any]:
    """Of the innermost function: which that is stays so, what it finds may change."""
    return getattr(inspect.unwrap(function), "__globals__", {})


class _Globals(dict[str, Any]):
    """The globals of a function with some of ours among them; the others are looked up as they are at the time."""

    def __init__(self, others: Mapping[str, Any], ours: Mapping[str, Function]) -> None:
        super().__init__(ours)
        self._others = others

    def __missing__(self, name: str) -> Any:
        return self._others[name]


def rebuilt(function: Any, ours: Mapping[str, Function]) -> Function | None:
    """The function once more, with ours among the globals of what it wraps; None where that is not in its closure."""
    within, known, cells = getattr(function, "__wrapped__", None), function.__globals__, function.__closure__ or ()
    if within is None:
        known = _Globals(known, ours)
    else:
        inner = rebuilt(within, ours)
        at = [n for n, cell in enumerate(cells) if _contents(cell) is within]
        if inner is None or not at:
            return None
        cells = tuple(types.CellType(inner) if n in at else cell for n, cell in enumerate(cells))
    made = types.FunctionType(function.__code__, known, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None
