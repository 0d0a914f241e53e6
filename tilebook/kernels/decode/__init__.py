"""Attention of few query rows against a long cache of keys and values, split-K (Flash-Decoding, Dao et al. 2023)."""

from __future__ import annotations

import torch

from tilebook import dispatch
from tilebook.kernels.decode import eager
from tilebook.kernels.decode.check import check
from tilebook.kernels.decode.ops import decode

__all__ = ["attention_decode"]


def attention_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale · q kᵀ) v for the last few queries of each sequence, with keys and values from a cache.

    Args:
        q: queries (B, H, S, D), of the last S positions of each sequence. Any strides.
        k: cached keys (B, Hkv, Sk, D), or, with a block table, (blocks, block size, Hkv, D). Any strides, but a cache
            whose last axis is not contiguous is copied. Hkv divides H; query head h reads head h // (H / Hkv).
        v: cached values, in the shape of k.
        seq_lens: (B,) int32, the keys of each sequence, those of the queries included; Sk if None. What the caches
            hold beyond is never used, whatever it is. Lengths are taken to lie in 0 … Sk, and stay on the GPU.
        block_table: (B, blocks of a sequence) int32, the blocks that hold each sequence's keys, in order; entries
            past the end of a sequence may be anything. Needs `seq_lens`.
        causal: row i of S sees the keys up to its own position, seq_lens − S + i: aligned at the bottom right, which
            is what decoding means and `attention` does not do. Otherwise each row sees all keys.
        scale: what the scores are multiplied by; D^-0.5 if None.
        softcap: c > 0 turns scores s into c · tanh(s / c), after scaling; 0 does not.
        window: each row sees no keys but the last `window` up to its own position, and what lies after it if not
            causal; all if None.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        o (B, H, S, D), in the dtype of q and with its order of axes in memory; with `return_lse` also lse (B, H, S) in
        fp32, natural log. A row that sees no key, as in an empty sequence, has o = 0 and lse = -infinity.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not go together; inputs that require gradients while
            they are recorded, for there is no backward: use `torch.no_grad()`, or `attention`.

    Kernels serve bf16 and fp16 on a GPU with S ≤ 16 and D a multiple of 8 from 16 to 256, sums in fp32; everything
    else is eager PyTorch, which keeps all scores. Fast where D is a multiple of 16. Calls are never held up: nothing
    is read back from the GPU.

    The algorithm is Flash-Decoding (Dao, Haziza, Massa, Sizov 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
    """
    factor = scale
    if factor is None:
        factor = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 0.0
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention_decode has no backward: call it under torch.no_grad(), or use attention")
    choice = dispatch.known(decode, q, k, v, seq_lens, block_table, causal, factor, softcap, window)
    if choice is None or choice.source == "fallback":
        check(q, k, v, seq_lens, block_table, softcap, window)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        args = q, k, v, seq_lens, block_table, causal, factor, softcap, window
        choice = dispatch.find(decode, *args) if q.numel() and k.numel() else None
        if choice is None:
            o, lse = eager.decode(*args)
            return (o, lse) if return_lse else o
    o, lse = choice(q, k, v, seq_lens, block_table, causal, factor, softcap, window)
    return (o, lse) if return_lse else o
