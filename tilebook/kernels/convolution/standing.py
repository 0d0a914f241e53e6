"""The op that PyTorch's autograd runs for a convolution's gradients, of which that of the weight may be ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tilebook.native import Standing
from tilebook.native.plans import Output, Rest, Theirs, contiguous
from tilebook.windows import Form

_MASK = 10
"""The argument that says which gradients are wanted: of the input, the weight and the bias."""


def _op() -> Any:
    from tilebook.kernels.convolution.ops import conv2d_weight_bwd

    return conv2d_weight_bwd


def _posed(args: Sequence[Any]) -> tuple[Any, ...] | None:
    dy, x, weight, _, stride, padding, dilation, transposed, _, groups, wanted = args
    if not wanted[1] or transposed or groups != 1 or not dy.ndim == x.ndim == weight.ndim == 4:
        return None
    if not dy.dtype == x.dtype == weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if not (x.is_contiguous() and weight.is_contiguous() and dy.numel() and x.numel()) or any(d != 1 for d in dilation):
        return None
    form = Form.of(weight.shape[2:], stride, padding)
    return dy.contiguous(), x, str(form)


def _rest(args: Sequence[Any]) -> Rest | None:
    wanted = args[_MASK]
    return Rest(_MASK, (bool(wanted[0]), False, bool(wanted[2]))) if wanted[0] or wanted[2] else None


def _gradients(args: Sequence[Any]) -> list[Output]:
    wanted = args[_MASK]
    return [
        Theirs(0) if wanted[0] else None,
        contiguous(args[2].shape) if wanted[1] else None,
        Theirs(2) if wanted[2] else None,
    ]


STANDINGS = (Standing("aten::convolution_backward", _op, _posed, (0, 1, None), _gradients, rest=_rest),)
"""In PyTorch's own order of arguments: (grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed,
output_padding, groups, output_mask)."""
