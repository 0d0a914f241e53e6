"""The additions that the extension asks for (`native/layouts.cpp`): ours may be them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tilebook.layout import transposed
from tilebook.native import Standing
from tilebook.native.plans import Ours, Output

_UNITS = 16
"""Of numbers, which are loaded so many at a time."""
_MOST_ROWS = 1 << 30
"""Numbers of a batch, which are counted in 32 bits."""


def _op() -> Any:
    from tilebook.kernels.addition.ops import add_fwd

    return add_fwd


def _dense(x: torch.Tensor) -> bool:
    """Does it fill its memory, in whatever order of its axes?"""
    count = 1
    for size, step in sorted(zip(x.shape, x.stride(), strict=True), key=lambda each: (each[1], each[0])):
        if size != 1 and step != count:
            return False
        count *= size
    return True


def _posed(args: Sequence[Any]) -> tuple[Any, ...] | None:
    x, y = args
    if not x.numel() or x.numel() % _UNITS:
        return None
    if x.stride() == y.stride():
        flat = [each.as_strided((each.numel(),), (1,)) for each in args]
        return tuple(flat) if _dense(x) else None
    if x.ndim == 4 and any(each.is_contiguous(memory_format=torch.channels_last) for each in args):
        x, y = (each.permute(0, 2, 3, 1) for each in args)
    for one, other in ((x, y), (y, x)):
        turned = transposed(one)
        if turned is not None and other.is_contiguous() and turned[0].numel() < _MOST_ROWS:
            plain = other.view(turned.shape)
            return (turned, plain) if one is x else (plain, turned)
    return None


def _sum(args: Sequence[Any]) -> list[Output]:
    return [Ours(tuple(args[0].shape), args[0].stride(), in_memory=True)]


STANDINGS = (Standing("tilebook_native::add", _op, _posed, (0, 1), _sum),)
