"""Decoding in eager PyTorch: the reference that kernels are judged by, and what serves where none can run."""

from __future__ import annotations

import torch


def contiguous(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """(blocks, block size, Hkv, D) → (B, Hkv, keys, D). Entries past a sequence's end may be anything."""
    rows = cache[block_table.clamp(0, cache.shape[0] - 1).long()]
    return rows.flatten(1, 2).transpose(1, 2)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seq_lens: torch.Tensor | None, block_table: torch.Tensor | None,
    causal: bool, scale: float, softcap: float, window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """→ o (B, H, S, D), lse (B, H, S) in fp32, natural log; 0 and -infinity for rows that see no key.

    Softmax in fp32, matrix products in the dtype of the inputs. Keeps the scores, B · H · S · keys in fp32.
    """
    if not q.numel():
        return q.clone(), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if block_table is not None:
        k, v = contiguous(k, block_table), contiguous(v, block_table)
    (batch, heads, n_q, width), (heads_kv, n_k) = q.shape, k.shape[1:3]
    lengths = torch.full((batch,), n_k, device=q.device) if seq_lens is None else seq_lens.clamp(0, n_k)
    columns = torch.arange(n_k, device=q.device)
    # Of each query among the keys, (B, S, 1).
    position = (lengths[:, None] - n_q + torch.arange(n_q, device=q.device))[..., None]
    visible = (columns < lengths[:, None, None]).expand(batch, n_q, n_k)
    if causal:
        visible = visible & (columns <= position)
    if window is not None:
        visible = visible & (columns > position - window)
    if seq_lens is not None:  # what lies past the end may be NaN, and 0 · NaN is not 0
        v = torch.where((columns < lengths[:, None])[:, None, :, None], v, 0)

    rows = heads // heads_kv * n_q  # that share the keys of one head
    grouped = q.reshape(batch, heads_kv, rows, width)
    scores = (grouped @ k.mT).float().view(batch, heads, n_q, n_k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(visible[:, None], scores, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None]).to(q.dtype)
    o = p.view(batch, heads_kv, rows, n_k) @ v
    return o.view(q.shape), lse
