"""A digest of what a function does: its source and that of every kernel and helper it reaches, comments left out."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def _unwrap(value: Any) -> Any:
    """The Python function behind a Triton kernel (compiled or interpreted) or a decorated function."""
    while not inspect.isfunction(value) and inspect.isfunction(getattr(value, "fn", None)):
        value = value.fn
    return inspect.unwrap(value) if inspect.isfunction(value) else value


def _tree(function: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    # What a decorator says of the implementation (its space above all) is not what the function computes.
    tree.decorator_list = []
    return tree


def _text(node: Any) -> str:
    """A syntax tree as text, alike in every version of Python: without fields that are empty or that some lack."""
    if isinstance(node, ast.JoinedStr):  # some versions put empty pieces between the parts of an f-string
        parts = [v for v in node.values if not (isinstance(v, ast.Constant) and v.value == "")]
        return f"JoinedStr(values={_text(parts)})"
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in _OPTIONAL)
        inside = ",".join(f"{name}={_text(value)}" for name, value in fields if value is not None and value != [])
        return f"{type(node).__name__}({inside})"
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    return repr(node)


_OPTIONAL = frozenset({"ctx", "kind", "type_comment", "type_params"})


def _globals(function: Any, tree: ast.FunctionDef, scope: str) -> Iterator[tuple[str, Any]]:
    """The module-level names that a function reads and what they stand for; of a module in scope, those read off it."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in sorted(names & function.__globals__.keys()):
        yield name, function.__globals__[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = function.__globals__.get(node.value.id)
            if inspect.ismodule(module) and _within(module.__name__, scope) and hasattr(module, node.attr):
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr)


KERNELS = "tilebook.kernels"


def _within(module: str, scope: str) -> bool:
    return module == scope or module.startswith(f"{scope}.")


def _scope(module: str) -> str:
    """The package whose functions count: all of ours whichever family they are of, or the one a stranger's op is in."""
    return KERNELS if _within(module, KERNELS) else module.split(".")[0]


def digest(function: Callable[..., Any]) -> str:
    """SHA-256 in hex over the syntax trees of `function` and of all it reaches inside `tilebook.kernels`.

    Of an op from elsewhere, inside its top-level package. Module constants that are read count by value, and named
    tuples by their fields. Equal after reformatting, after edits of comments and docstrings, and under Triton's
    interpreter.
    """
    found = texts(function)
    return hashlib.sha256("\n".join(f"{name}\n{text}" for name, text in sorted(found.items())).encode()).hexdigest()


def module_name(module: str) -> str:
    """A module as others import it: what runs as `__main__` by the name of its file."""
    main = sys.modules.get("__main__")
    if module != "__main__" or main is None:
        return module
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return str(spec.name) if spec is not None else Path(file).stem if file else module


def texts(function: Callable[..., Any]) -> dict[str, str]:
    """What `digest` is taken of: the syntax trees by the functions' names, and the constants by theirs."""
    texts: dict[str, str] = {}
    scope = _scope(function.__module__)
    waiting = [_unwrap(function)]
    while waiting:
        current = waiting.pop()
        module = module_name(current.__module__)
        name = f"{module}.{current.__qualname__}"
        if name in texts:
            continue
        tree = _tree(current)
        texts[name] = _text(tree)
        for label, value in _globals(current, tree, scope):
            reached = _unwrap(value)
            if inspect.isfunction(reached):
                if _within(reached.__module__, scope):
                    waiting.append(reached)
            elif isinstance(value, type) and issubclass(value, tuple) and _within(value.__module__, scope):
                texts[f"{module_name(value.__module__)}.{value.__qualname__}"] = repr(getattr(value, "_fields", ()))
            elif isinstance(value, int | float | str | bool):
                texts[f"{module}.{label}"] = repr(value)
            elif isinstance(getattr(value, "value", None), int | float | str | bool):  # tl.constexpr
                texts[f"{module}.{label}"] = repr(value.value)
    return texts
