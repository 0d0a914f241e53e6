"""How tensors lie in memory, and what kernels can make of that."""

from __future__ import annotations

import torch

MOST_STEPS = 1 << 23
"""Elements from row to row that kernels allow for, so that a tile's rows lie within 2³¹ elements."""


def addressable(x: torch.Tensor) -> torch.Tensor:
    """`x`, (B, H, S, D) or packed (T, H, D), copied only if the kernels cannot address it: its rows are not contiguous,
    or lie too far apart."""
    rows = -2 if x.ndim == 4 else 0
    return x if x.stride(-1) == 1 and x.stride(rows) < MOST_STEPS else x.contiguous()


def like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor with the shape and the order of axes of `x`, its last axis contiguous."""
    made = torch.empty_like(x)
    return made if made.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def describable(*tensors: torch.Tensor) -> bool:
    """Can tensor descriptors address them? The hardware wants 16-byte steps, and no axis of step 0."""
    return all(
        x.data_ptr() % 16 == 0 and all(step > 0 and step * x.itemsize % 16 == 0 for step in x.stride()[:-1])
        for x in tensors
    )


def described(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if tensor descriptors cannot address it: also one piece of memory that begins anywhere, or has
    an axis of length 1 whose step is odd."""
    return x if describable(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
