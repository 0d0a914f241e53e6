"""Grouped queries for kernels that want as many heads of k and v as of q."""

from __future__ import annotations

import torch


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """k or v with every head repeated for the query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def sum_heads(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """The reverse of `repeat_heads` for gradients."""
    return x if x.shape[1] == heads_kv else x.unflatten(1, (heads_kv, -1)).sum(2)
