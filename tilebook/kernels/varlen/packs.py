"""Packed sequences in a batch (B, H, S, D), as a mask shows them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tilebook.kernels.attention.structure import Lengths, Structure
from tilebook.kernels.varlen import attention_varlen
from tilebook.kernels.varlen.limits import WIDTHS


def attention_of_packs(q: Tensor, k: Tensor, v: Tensor, found: Structure, scale: float | None) -> Tensor | None:
    """o (B, H, S, D), (B, S, H, D) in memory, of sequences none of which sees another.

    q: (B, H, S, D). k, v: (B, Hkv, S, D). None where there are no kernels: PyTorch would go sequence by sequence.
    """
    if q.shape[-1] not in WIDTHS or k.shape[2] != q.shape[2]:
        return None
    return flattened(q, k, v, found, found.lengths(), scale=scale)


def flattened(q: Tensor, k: Tensor, v: Tensor, found: Structure, lengths: Lengths, **how: Any) -> Tensor:
    """The same by the sequences' ends in the flattened batch. how: more arguments of `attention_varlen`."""
    batch, heads, n, _ = q.shape
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
    o: Tensor = attention_varlen(
        q, k, v, lengths.cu_seqlens_q, lengths.cu_seqlens_k, max_seqlen_q=lengths.max_seqlen_q,
        max_seqlen_k=lengths.max_seqlen_k, causal=bool(found.causal), window=found.window, **how,
    )  # fmt: skip
    return o.reshape(batch, n, heads, -1).transpose(1, 2)
