"""The sum of rows that the extension asks for in autocast's linear layers (`native/casts.cpp`): ours may be it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tilebook.native import Standing
from tilebook.native.plans import Output, contiguous, number_of


def _op() -> Any:
    from tilebook.kernels.bias.ops import bias_bwd

    return bias_bwd


def _posed(args: Sequence[Any]) -> tuple[Any, ...] | None:
    dy, dtype = args
    if dtype != number_of(torch.float32) or dy.dtype not in (torch.bfloat16, torch.float16):
        return None
    return (dy,) if dy.ndim == 2 and dy.numel() and dy.is_contiguous() else None


def _sum(args: Sequence[Any]) -> list[Output]:
    return [contiguous((args[0].shape[1],))]


STANDINGS = (Standing("tilebook_native::column_sum", _op, _posed, (0,), _sum),)
