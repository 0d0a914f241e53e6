"""How tensors lie in memory, and copies of those that lie otherwise than kernels take them."""

from __future__ import annotations

import math

import torch

VECTOR = 16
"""Bytes that kernels load at once: where tensors start, and what their steps are multiples of."""

PIECE = 8
"""Bytes of a mask's row that kernels load at once, where rows lie one after the other: what a row is a multiple of."""


def rows(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose last axis is contiguous, as kernels step through it; a copy only where it is not so."""
    return x if x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def beside(x: torch.Tensor) -> int:
    """S, where a tensor (B, S, N) lies in one piece with the last two axes transposed, as (B, N, S); else 0."""
    if x.ndim != 3:
        return 0
    (batches, length, width), (step, *others) = x.shape, x.stride()
    dense = length > 1 and width > 1 and others == [1, length] and (batches == 1 or step == length * width)
    return length if dense else 0


def transposed(x: torch.Tensor) -> torch.Tensor | None:
    """(…, N) as (B, S, N), no copy, if its rows are side by side in memory, as a convolution's channels are; else None.

    For `flatten(2).transpose(1, 2)` and `permute(0, 2, 3, 1)` of (B, C, …), among others.
    """
    if x.ndim < 2 or x.stride(-1) == 1 or not x.numel():
        return None
    for axis in range(x.ndim - 1):
        if x.movedim(-1, axis).is_contiguous():
            found = x.view(math.prod(x.shape[:axis]), -1, x.shape[-1])
            return found if beside(found) else None
    return None


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
