"""How a launcher starts a Triton kernel; also the one place where tools can see what it would start."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tilebook import assembler

HOST_DESCRIPTORS_S = 25e-6
"""Calls with a floor below this do not use host-side tensor descriptors.

Making those of one launch costs the host 20–30 µs (measured with Triton 3.6): a GPU that is done sooner would wait for
them, whatever the kernel gains.
"""

Launch = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


class _Thread(threading.local):
    intercept: Launch | None = None


_thread = _Thread()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Starts `kernel` over `grid` programs with run-time arguments `args`; `meta` holds constexprs and options.

    Every launcher goes through here, so that a launcher run on meta tensors tells the compiler which kernels, with
    which arguments, a config needs: see `intercepted`.
    """
    if _thread.intercept is None:
        start(kernel, grid, args, meta)
    else:
        _thread.intercept(kernel, grid, args, meta)


def start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
    """Starts a kernel; returns what Triton compiled of it, or nothing in its interpreter."""
    if not assembler.wanted():
        return with_scratch(kernel[grid], *args, **meta)
    with assembler.newer() as options:
        return with_scratch(kernel[grid], *args, **meta, **options)


def with_scratch(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Calls what starts a kernel that may want memory of its own, for tensor descriptors that it makes.

    Triton's allocator is a context variable: the one that a program has set for its own kernels stays what it is.
    """
    from triton import set_allocator  # here: programs on the CPU do without Triton

    context = contextvars.copy_context()
    context.run(set_allocator, _scratch)
    return context.run(function, *args, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.UntypedStorage:
    """Memory of the current stream, like that of any tensor: whoever gets it next comes after the kernel.

    PyTorch aligns to 512 bytes. It is no tensor, so that a recorded call, which asks anew, does not count it as one.
    """
    return torch.UntypedStorage(size, device="cuda")  # type: ignore[no-untyped-call]


@contextmanager
def intercepted(by: Launch) -> Iterator[None]:
    """Inside the block, launches of this thread call `by(kernel, grid, args, meta)` instead of running."""
    previous, _thread.intercept = _thread.intercept, by
    try:
        yield
    finally:
        _thread.intercept = previous
