"""How tensors lie in memory, and copies of those that lie otherwise than kernels take them."""

from __future__ import annotations

import torch

VECTOR = 16
"""Bytes that kernels load at once: where tensors start, and what their steps are multiples of."""


def rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose last axis is contiguous, as kernels step through it; a copy only where it is not so."""
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def fits(x: torch.Tensor) -> bool:
    """Does a tensor start at whole vectors and step by them, or lie in one piece? It must have an address."""
    if x.data_ptr() % VECTOR:
        return False
    last, unit = x.ndim - 1, x.itemsize
    whole = all(
        step == 1 if axis == last else step > 0 and step * unit % VECTOR == 0
        for axis, (step, n) in enumerate(zip(x.stride(), x.shape, strict=True))
        if n > 1
    )
    return whole or x.is_contiguous()


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A tensor as kernels of PyTorch's take it that load whole vectors without looking; a copy only where it is not."""
    return x if fits(x) else x.clone(memory_format=torch.contiguous_format)
