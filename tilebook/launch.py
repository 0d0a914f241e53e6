"""How a launcher starts a Triton kernel; also the one place where tools can see what it would start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Launch = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]

_intercept: Launch | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Starts `kernel` over `grid` programs with run-time arguments `args`; `meta` holds constexprs and options.

    Every launcher goes through here, so that a launcher run on meta tensors tells the compiler which kernels, with
    which arguments, a config needs: see `intercepted`.
    """
    if _intercept is None:
        kernel[grid](*args, **meta)
    else:
        _intercept(kernel, grid, args, meta)


@contextmanager
def intercepted(by: Launch) -> Iterator[None]:
    """Inside the block, launches call `by(kernel, grid, args, meta)` instead of running."""
    global _intercept
    previous, _intercept = _intercept, by
    try:
        yield
    finally:
        _intercept = previous
