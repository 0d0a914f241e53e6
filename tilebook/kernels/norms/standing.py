"""The norms of PyTorch's that ours stand for, gradients apart: what its autograd calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from tilebook.kernels.norms.entry import registered, turned
from tilebook.native import Standing
from tilebook.native.plans import Output, contiguous

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _op(name: str, direction: int) -> Any:
    return registered(name)[direction]


def _rows(x: torch.Tensor, shape: Sequence[int], vectors: Sequence[Any], more: Sequence[torch.Tensor] = ()) -> bool:
    """Is it a norm over the last axis of tensors of one dtype, with both vectors, the first or none?"""
    if len(shape) != 1 or not x.numel() or x.dtype not in _DTYPES or tuple(shape) != tuple(x.shape[-1:]):
        return False
    given = [each for each in vectors if each is not None]
    if given and vectors[0] is None:
        return False
    if not all(each.dtype == x.dtype and each.shape == x.shape[-1:] for each in given):
        return False
    return all(each.shape == x.shape for each in more)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(M, N), contiguous, as PyTorch's kernels make it too."""
    return x.contiguous().view(-1, x.shape[-1])


def _laid(op: Any, before: Sequence[Any], x: torch.Tensor, after: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of ours: x as it lies where it is transposed and a verdict is on that, else flat."""
    return turned(op, (*before, x, *after), len(before)) or (*before, _flat(x), *after)


def _vector(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _outputs(args: Sequence[Any], statistics: int) -> list[Output]:
    """y, and what is kept of each row."""
    shape = args[0].shape
    return [contiguous(shape), *[contiguous((*shape[:-1], 1))] * statistics]


def _layer_forward(args: Sequence[Any]) -> tuple[Any, ...] | None:
    x, shape, weight, bias, eps = args
    if not _rows(x, shape, (weight, bias)):
        return None
    return _laid(_op("layer_norm", 0), (), x, (_vector(weight), _vector(bias), eps))


def _rms_forward(args: Sequence[Any]) -> tuple[Any, ...] | None:
    x, shape, weight, eps = args
    if eps is None or not _rows(x, shape, (weight,)):
        return None
    return _laid(_op("rms_norm", 0), (), x, (_vector(weight), eps))


def _layer_backward(args: Sequence[Any]) -> tuple[Any, ...] | None:
    dy, x, shape, mean, rstd, weight, bias, needs = args
    if not _wanted(needs, (x, weight, bias)) or not _rows(x, shape, (weight, bias), (dy,)):
        return None
    if not all(each.dtype == torch.float32 and each.numel() == x[..., 0].numel() for each in (mean, rstd)):
        return None
    after = _vector(weight), _vector(bias), mean.reshape(-1), rstd.reshape(-1)
    return _laid(_op("layer_norm", 1), (_flat(dy),), x, after)


def _rms_backward(args: Sequence[Any]) -> tuple[Any, ...] | None:
    dy, x, shape, rstd, weight, needs = args
    if not _wanted(needs, (x, weight)) or not _rows(x, shape, (weight,), (dy,)):
        return None
    if rstd.dtype != torch.float32 or rstd.numel() != x[..., 0].numel():
        return None
    after = _vector(weight), rstd.reshape(-1)
    return _laid(_op("rms_norm", 1), (_flat(dy),), x, after)


def _wanted(needs: Sequence[bool], tensors: Sequence[Any]) -> bool:
    """Are gradients of all that is there wanted? A kernel of ours computes them together."""
    return all(need or tensor is None for need, tensor in zip(needs, tensors, strict=True))


def _gradients(tensors: Sequence[Any]) -> list[Output]:
    return [None if each is None else contiguous(each.shape) for each in tensors]


STANDINGS = (
    Standing(
        "aten::native_layer_norm",
        partial(_op, "layer_norm", 0),
        _layer_forward,
        (0, 2, 3, None),
        partial(_outputs, statistics=2),
    ),
    Standing(
        "aten::native_layer_norm_backward",
        partial(_op, "layer_norm", 1),
        _layer_backward,
        (0, 1, 5, 6, 3, 4),
        lambda args: _gradients((args[1], args[5], args[6])),
    ),
    Standing(
        "aten::_fused_rms_norm",
        partial(_op, "rms_norm", 0),
        _rms_forward,
        (0, 2, None),
        partial(_outputs, statistics=1),
    ),
    Standing(
        "aten::_fused_rms_norm_backward",
        partial(_op, "rms_norm", 1),
        _rms_backward,
        (0, 1, 4, 3),
        lambda args: _gradients((args[1], args[4])),
    ),
)
"""In PyTorch's own order of arguments: (input, normalized_shape, weight, bias, eps) and, with what a forward pass has
kept, (grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask); RMSNorm's less mean and bias."""
