"""PyTorch's own compiler as an implementation of an op: what `torch.compile` makes of its formula in eager PyTorch.

A verdict that was measured beside it says whether kernels of ours are ahead of what a compiled program would run.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from tilebook.device import Device
from tilebook.errors import TilebookError
from tilebook.op import Op

NAME = "inductor"
"""Of these implementations, whatever the op."""

MOST_CALLS = 64
"""So many kinds of calls of a formula are compiled at most, for seconds each. A call with one more is served else."""

_numbers = itertools.count()


def available(device: Device) -> bool:
    return device.backend == "cuda" and device.capability >= 80


def register(op: Op[Any], formula: Callable[..., Any], *leading: Any, supports: Callable[[Any], bool]) -> None:
    """Makes it an implementation of the op, whose arguments come after the `leading` ones.

    supports: for which problems. Guards and wrappers of a compiled call cost the host tens of microseconds, for which a
    GPU that is done sooner would wait.
    """
    called = compiled(formula, *leading)
    op.implementation(NAME, external="torch", available=available, supports=supports)(called)


def compiled(formula: Callable[..., Any], *leading: Any) -> Callable[..., Any]:
    """`formula`, compiled by Inductor for each kind of call: shapes, strides and dtypes of tensors, other arguments.

    It compiles at the first call of each kind, for seconds: before a graph is captured. Raises TilebookError where
    `MOST_CALLS` kinds were compiled already.
    """
    made: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        kind = tuple(_kind(each) for each in args)
        with torch.no_grad(), unwatched(), torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
            if kind not in made:
                if len(made) >= MOST_CALLS:
                    raise TilebookError(f"{formula.__name__} was compiled for {MOST_CALLS} kinds of calls already")
                made[kind] = alone(formula)
            return made[kind](*leading, *args)

    return run


def _kind(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return tuple(argument.shape), argument.stride(), argument.dtype, argument.device


def alone(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, with code of its own: PyTorch keeps what it compiled by code, a few versions of each."""
    function = cast(types.FunctionType, formula)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    another = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(another, **_how())


def _how() -> dict[str, Any]:
    """One thread: a pool of compilers would outlive the call, and the tuner takes a process left behind for a fault."""
    return {"fullgraph": True, "dynamic": False, "options": {"compile_threads": 1}}


@contextmanager
def unwatched() -> Iterator[None]:
    """Without the modes that see every call of PyTorch's functions: they would be compiled along."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)
