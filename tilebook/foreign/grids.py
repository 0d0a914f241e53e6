"""How a launch's grid follows a config that takes the place of what a program passes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tilebook.errors import UsageError

Grid = tuple[int, ...]

SAME = "same"

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip


def plain(grid: Any, meta: Mapping[str, Any]) -> Grid:
    """A grid as numbers, whatever a program has given: numbers, or a function of a launch's arguments."""
    whole = grid(meta) if callable(grid) else grid
    return tuple(map(int, whole if isinstance(whole, Sequence) else (whole,)))


def followed(grid: Any, meta: Mapping[str, Any], constants: Collection[str]) -> Grid | None:
    """The grid with these arguments; None where it is no function that asks for any of a launch's constants: such a
    grid may be computed from what the program passes."""
    asked = _Asked(meta)
    made = plain(grid, asked)
    return None if asked.names.isdisjoint(constants) else made


class _Asked(dict[str, Any]):
    """Notes what is asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


class Written:
    """A grid as texts, one a dimension: whole numbers, a kernel's arguments, + - * // % and cdiv(a, b).

    Raises UsageError where a text is anything else."""

    def __init__(self, texts: Sequence[str | int], names: Collection[str]) -> None:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise UsageError(f"grid is 'same' or a list of dimensions, not {texts!r}")
        self._trees = []
        for text in texts:
            try:
                tree = ast.parse(str(text), mode="eval").body
                _computed(tree, dict.fromkeys(names, 2))
            except (SyntaxError, KeyError, ValueError, ArithmeticError, RecursionError, MemoryError):
                raise UsageError(
                    f"grid: {text!r} is no arithmetic (+ - * // % cdiv) on the kernel's arguments"
                ) from None
            self._trees.append(tree)

    def __call__(self, values: Mapping[str, Any]) -> Grid:
        return tuple(int(_computed(tree, values)) for tree in self._trees)


def _computed(node: ast.expr, values: Mapping[str, Any]) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name):
            return int(values[name])
        case ast.BinOp(left=a, op=how, right=b) if type(how) in _OPERATORS:
            return _OPERATORS[type(how)](_computed(a, values), _computed(b, values))
        case ast.Call(func=ast.Name(id="cdiv"), args=[a, b], keywords=[]):
            return -(-_computed(a, values) // _computed(b, values))
    raise ValueError(ast.unparse(node))
