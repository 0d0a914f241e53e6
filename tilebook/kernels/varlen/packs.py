"""Packed sequences in a batch (B, H, S, D), as a mask shows them."""

from __future__ import annotations

from torch import Tensor

from tilebook.kernels.attention.structure import Structure
from tilebook.kernels.varlen import attention_varlen
from tilebook.kernels.varlen.limits import WIDTHS


def attention_of_packs(q: Tensor, k: Tensor, v: Tensor, found: Structure, scale: float | None) -> Tensor | None:
    """o (B, H, S, D), (B, S, H, D) in memory, of sequences none of which sees another.

    q: (B, H, S, D). k, v: (B, Hkv, S, D). None where there are no kernels: PyTorch would go sequence by sequence.
    """
    batch, heads, n, width = q.shape
    if width not in WIDTHS or k.shape[2] != n:
        return None
    lengths = found.lengths()
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], width) for x in (q, k, v))
    o = attention_varlen(
        q, k, v, lengths.cu_seqlens_q, lengths.cu_seqlens_k, max_seqlen_q=lengths.max_seqlen_q,
        max_seqlen_k=lengths.max_seqlen_k, causal=bool(found.causal), window=found.window, scale=scale,
    )  # fmt: skip
    return o.reshape(batch, n, heads, width).transpose(1, 2)
