"""Norms in PyTorch's own functions, differentiable by its autograd: what runs where no kernel serves."""

from __future__ import annotations

from typing import Any

import torch

HOST_BOUND = 1 << 22
"""Elements up to which the GPU is done with an eager call before the host has made the next one."""


def rms(tensors: tuple[Any, ...], options: tuple[float]) -> torch.Tensor:
    """RMSNorm's y for an entry's tensors (x, weight), weight None or not, and options (eps,)."""
    (x, weight), (eps,) = tensors, options
    given: Any = x
    if weight is not None and weight.dtype != x.dtype:
        wide = torch.promote_types(x.dtype, torch.float32)
        given, weight = x.to(wide), weight.to(wide)
    y = torch.rms_norm(given, x.shape[-1:], weight, eps)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast would have it in fp32


def of_sum(norm: Any, tensors: tuple[Any, ...], options: tuple[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) for an entry's tensors (x, residual, …) of this norm: that of h = x + residual."""
    x, residual, *vectors = tensors
    h = x + residual
    return norm((h, *vectors), options), h


def layer(tensors: tuple[Any, ...], options: tuple[float]) -> torch.Tensor:
    """LayerNorm's y for an entry's tensors (x, weight, bias), vectors None or not, and options (eps,)."""
    (x, weight, bias), (eps,) = tensors, options
    given: Any = x
    if any(each is not None and each.dtype != x.dtype for each in (weight, bias)):
        wide = torch.promote_types(x.dtype, torch.float32)
        given, weight, bias = (each if each is None else each.to(wide) for each in tensors)
    y = torch.layer_norm(given, x.shape[-1:], weight, bias, eps)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast would have it in fp32
