"""The op that PyTorch's autograd runs for max pooling's gradient: ours may be it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tilebook.kernels.pooling.problem import by_channels, order
from tilebook.native import Standing
from tilebook.native.plans import Ours, Output
from tilebook.windows import Form

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _op() -> Any:
    from tilebook.kernels.pooling.ops import max_pool2d_bwd

    return max_pool2d_bwd


def _posed(args: Sequence[Any]) -> tuple[Any, ...] | None:
    dy, x, kernel, stride, padding, dilation, ceil_mode, indices = args
    if not dy.ndim == x.ndim == indices.ndim == 4 or dy.dtype != x.dtype or x.dtype not in _DTYPES:
        return None
    if ceil_mode or any(each != 1 for each in dilation) or not (dy.numel() and x.numel()):
        return None
    last = by_channels(x)
    laid = order(last)
    if last != by_channels(indices) or not all(each.is_contiguous(memory_format=laid) for each in (x, indices)):
        return None
    if last and not dy.is_contiguous(memory_format=laid):
        return None  # a copy would lie by rows
    form = Form.of(kernel, stride or kernel, padding)
    return dy.contiguous(memory_format=laid), indices, x.shape[2], x.shape[3], str(form)


def _gradient(args: Sequence[Any]) -> list[Output]:
    return [Ours(tuple(args[1].shape), args[1].stride())]


STANDINGS = (Standing("aten::max_pool2d_with_indices_backward", _op, _posed, (0, 7, None, None, None), _gradient),)
"""In PyTorch's own order: (grad_output, self, kernel_size, stride, padding, dilation, ceil_mode, indices)."""
