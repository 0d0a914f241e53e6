"""Decoding in PyTorch's own functions: what runs where no kernel serves."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.attention.pytorch import sdpa
from tilebook.kernels.decode import eager


def simple(q: torch.Tensor, seq_lens: Any, block_table: Any, softcap: float, window: int | None) -> bool:
    """One row against the whole of a contiguous cache, which PyTorch's attention computes as it is?"""
    return q.shape[2] == 1 and seq_lens is None and block_table is None and not softcap and window is None


def plain(tensors: tuple[Any, ...], options: tuple[bool, float, float, int | None]) -> torch.Tensor:
    """o for an entry's tensors (q, k, v, seq_lens, block_table) and options (causal, scale, softcap, window)."""
    (q, k, v, seq_lens, block_table), (causal, scale, softcap, window) = tensors, options
    if simple(q, seq_lens, block_table, softcap, window) and q.numel() and k.numel():
        return sdpa(q, k, v, False, scale)
    return eager.decode(q, k, v, seq_lens, block_table, causal, scale, softcap, window)[0]
