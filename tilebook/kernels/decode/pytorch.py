"""Decoding in PyTorch's own functions: what runs where no kernel serves."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.attention.pytorch import sdpa
from tilebook.kernels.decode import eager


def simple(q: torch.Tensor, seq_lens: Any, block_table: Any, softcap: float, window: int | None) -> bool:
    """One row against the whole of a contiguous cache, which PyTorch's attention computes as it is?"""
    return q.shape[2] == 1 and seq_lens is None and block_table is None and not softcap and window is None


def seen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """k, v and the window, without what no row sees of full contiguous caches.

    One row sees all that is left and has no window any more, so that PyTorch's attention serves it as it is.
    """
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and window > 0):
        return k, v, window
    reach = window + q.shape[2] - 1
    if reach < k.shape[2]:
        k, v = k[:, :, -reach:], v[:, :, -reach:]
    return k, v, None if q.shape[2] == 1 else window


def plain(tensors: tuple[Any, ...], options: tuple[bool, float, float, int | None]) -> torch.Tensor:
    """o for an entry's tensors (q, k, v, seq_lens, block_table) and options (causal, scale, softcap, window)."""
    (q, k, v, seq_lens, block_table), (causal, scale, softcap, window) = tensors, options
    if simple(q, seq_lens, block_table, softcap, window) and q.numel() and k.numel():
        return sdpa(q, k, v, False, scale)
    return eager.decode(q, k, v, seq_lens, block_table, causal, scale, softcap, window)[0]
