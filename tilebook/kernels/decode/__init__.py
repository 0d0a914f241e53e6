"""Attention of few query rows against a long cache of keys and values, split-K (Flash-Decoding, Dao et al. 2023)."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import recorded, way
from tilebook.kernels.attention.check import multiplier, numbers
from tilebook.kernels.attention.drop_in import kind
from tilebook.kernels.decode import eager
from tilebook.kernels.decode.check import check
from tilebook.kernels.decode.entry import DECODE, registered
from tilebook.kernels.decode.pytorch import plain, seen
from tilebook.layout import aligned, rows
from tilebook.left import Left, again, gated, keep, recall, unsettled

__all__ = ["attention_decode"]


Pair = tuple[torch.Tensor, torch.Tensor]
"""(o, lse)"""


class Options(TypedDict, total=False):
    """What `attention_decode` is told beside q and the caches and `return_lse`, which decides what it returns."""

    seq_lens: torch.Tensor | None
    block_table: torch.Tensor | None
    causal: bool
    scale: float | None
    softcap: float
    window: int | None


@overload
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[Options]
) -> torch.Tensor: ...
@overload
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> Pair: ...
@overload
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Options]
) -> torch.Tensor | Pair: ...
@gated("attention_decode")
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
) -> Any:
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
    full = seq_lens is None and block_table is None and type(q) is type(k) is type(v) is torch.Tensor
    if full and type(window) is int and not (torch.compiler.is_compiling() or has_torch_function((q, k, v))):
        k, v, window = seen(q, k, v, window)
    tensors = q, k, v, seq_lens, block_table
    own = None
    usual = full and not softcap and window is None and not return_lse
    if usual and (causal is True or causal is False):
        positive, near = scale is None or (type(scale) is float and scale > 0), ("decode", q.shape, causal)
        if positive and (again(near, q, k, v) or recall(own := ("decode", *kind(q, k, v, causal)), near, q, k, v)):
            return plain(tensors, (causal, q.shape[-1] ** -0.5 if scale is None else scale, softcap, window))
    if has_torch_function(tensors):
        return handle_torch_function(
            attention_decode, tensors, q, k, v, seq_lens=seq_lens, block_table=block_table, causal=causal, scale=scale,
            softcap=softcap, window=window, return_lse=return_lse,
        )  # fmt: skip
    route = way(q, k, v, optional=(seq_lens, block_table))
    if recorded((q, k, v)):
        raise ValueError("attention_decode has no backward: call it under torch.no_grad(), or use attention")
    scale = numbers(scale, softcap)
    if causal not in (False, True):
        raise ValueError(f"causal must be a bool, not {causal!r}: the last query sees every key")
    if window is not None and not isinstance(window, int):
        check(*tensors, softcap, window)
    options = causal, multiplier(scale, q), float(softcap), window
    choice = dispatch.known(registered(), (*tensors, *options)) if route == "direct" else None
    if choice is None:
        check(*tensors, softcap, window)
        if route == "pytorch" or not (q.numel() and k.numel()):
            return _plain(tensors, options, return_lse)
        tensors = rows(q), rows(k), rows(v), seq_lens, block_table
        if route == "op":
            o, lse = DECODE.through(tensors, options)
            return (o, lse) if return_lse else o
        choice = dispatch.lookup(registered(), (*tensors, *options))
    if choice.native and not choice.probed:
        choice.calls += 1
        if own is not None and unsettled(own, choice):
            keep(own, Left(forward=True, training=False, bounded=False, choice=choice))
        tensors = tensors if choice.aligned else (aligned(q), aligned(k), aligned(v), seq_lens, block_table)
        return _plain(tensors, options, return_lse)
    o, lse = DECODE.direct(choice, tensors, options)
    return (o, lse) if return_lse else o


def _plain(tensors: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    return eager.decode(*tensors, *options) if return_lse else plain(tensors, options)  # type: ignore[arg-type]
