"""Attention of packed sequences of any lengths, none of which sees another (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

from typing import Any, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import native, tf32_allowed, untraceable, way
from tilebook.casting import autocast
from tilebook.kernels.attention.check import multiplier, numbers, sides
from tilebook.kernels.attention.form import Form, form
from tilebook.kernels.varlen.check import check
from tilebook.kernels.varlen.entry import VARLEN, registered
from tilebook.kernels.varlen.limits import bucket, simplest
from tilebook.kernels.varlen.pytorch import log_sum_exp, plain
from tilebook.layout import rows

__all__ = ["attention_varlen"]


def _form(causal: bool | str, window: Any, max_q: int, max_k: int, **rest: Any) -> Form:
    """The form of a call, in its simplest terms."""
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"causal must be a bool, 'bottom_right' or 'top_left', not {causal!r}")
    left, right = sides(window)
    right, corner = 0 if causal else right, causal != "top_left"
    if not torch.compiler.is_compiling():  # a trace may not know the lengths; the op simplifies when it runs
        left, right, corner = simplest(max_q, max_k, left, right, corner)
    return form(left=left, right=right, bottom_right=corner, **rest)


Pair = tuple[torch.Tensor, torch.Tensor]
"""(o, lse)"""


class Options(TypedDict, total=False):
    """What `attention_varlen` is told beside its tensors and `return_lse`, which decides what it returns."""

    max_seqlen_q: Required[int]
    max_seqlen_k: Required[int]
    causal: bool | Literal["bottom_right", "top_left"]
    scale: float | None
    window: tuple[int | None, int | None] | None
    softcap: float
    deterministic: bool


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    return_lse: Literal[False] = ..., **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    return_lse: Literal[True], **options: Unpack[Options],
) -> Pair: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *,
    return_lse: bool, **options: Unpack[Options],
) -> Tensor | Pair: ...  # fmt: skip
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool | Literal["bottom_right", "top_left"] = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """softmax(scale · q kᵀ) v of each of B sequences packed one after the other, unpadded; differentiable once.

    Args:
        q: queries (T, H, D). Any strides.
        k: keys (Tk, Hkv, D). Hkv divides H; query head h reads key/value head h // (H / Hkv).
        v: values (Tk, Hkv, D).
        cu_seqlens_q: (B + 1,) int32, rising from 0: sequence b has the queries cu_seqlens_q[b] … cu_seqlens_q[b + 1].
            It stays on the GPU, where nothing checks it; numbers outside of 0 … T are held to that range.
        cu_seqlens_k: the same of keys and values. A sequence may be empty in either.
        max_seqlen_q: no sequence has more queries. Kernels are chosen by it and write the same whatever it is, but for
            FlashAttention-2, which leaves out what lies beyond.
        max_seqlen_k: no sequence has more keys.
        causal: row i of a sequence sees the columns up to its diagonal. True and "bottom_right" align it as
            FlashAttention's varlen functions do, the last row with the last column: unlike `tilebook.attention`, whose
            True is PyTorch's "top_left", row i with column i. The same for sequences with as many queries as keys.
        scale: what the scores are multiplied by; D^-0.5 if None.
        window: (left, right): row i sees that many columns before and after its diagonal, -1 or None for no limit. The
            diagonal is that of `causal`, bottom-right without one. Tiles that no row sees are skipped.
        softcap: scores s become softcap · tanh(s / softcap), after scaling; 0 is off.
        return_lse: return (o, lse).
        deterministic: only implementations that give the same bits every time. Ours do, also without.

    Returns:
        o (T, H, D), in the dtype of q; with `return_lse` also the natural log-sum-exp of each row's scores, (H, T) in
        fp32, without gradient. A row that sees nothing has o = 0, lse = -inf and gradients 0, and so have rows of q, k
        and v behind the last sequence, whatever they hold.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, options out of range, and on the CPU lengths
            that do not rise from 0 to at most T.

    No number of one sequence enters another, NaN and infinity included. Kernels take bf16, fp16 and fp32 on a GPU with
    D a multiple of 8 from 16 to 256 and scale > 0, sums in fp32; fp32 factors are rounded to tf32 where
    `torch.backends.cuda.matmul.allow_tf32` has it. They never read a length on the host, so a CUDA graph that captured
    a call follows the lengths. Without a verdict that covers a call they serve bf16 and fp16 with D 32, 64 or 128.
    Everything else runs the same in PyTorch, a sequence at a time, and has to wait for the lengths. Under autocast q, k
    and v are cast as there. `torch.compile` sees one op, `tilebook::attention_varlen_fwd`.

    The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
    """
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    if has_torch_function(tensors):
        itself: Any = attention_varlen
        return handle_torch_function(
            itself, tensors, *tensors, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, causal=causal, scale=scale,
            window=window, softcap=softcap, return_lse=return_lse, deterministic=deterministic,
        )  # fmt: skip
    route = untraceable(way(*tensors), *tensors)
    q, k, v = autocast(q, k, v)
    scale = numbers(scale, softcap)
    factor = multiplier(scale, q)
    max_q, max_k = max_seqlen_q, max_seqlen_k
    if type(max_q) is int and type(max_k) is int and not torch.compiler.is_compiling():
        max_q, max_k = bucket(max_q), bucket(max_k)
    else:
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    found = _form(
        causal, window, max_q, max_k, softcap=float(softcap), tf32=q.dtype == torch.float32 and tf32_allowed(),
        deterministic=bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    tensors, options = (q, k, v, cu_seqlens_q, cu_seqlens_k), (max_q, max_k, found, factor)
    choice = dispatch.known(registered()[0], (*tensors, *options)) if route == "direct" else None
    if choice is None:
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        usual = q.numel() and k.numel() and len(cu_seqlens_q) > 1 and factor > 0
        if route == "pytorch" or not usual:
            return _plain(tensors, options, return_lse)
        tensors = (rows(q), rows(k), rows(v), cu_seqlens_q, cu_seqlens_k)
        if route == "op":
            o, lse = VARLEN.through(tensors, options)
            return (o, lse) if return_lse else o
        choice = dispatch.lookup(registered()[0], (*tensors, *options))
    if native(choice, tensors):
        choice.calls += 1
        return _plain(tensors, options, return_lse)
    o, lse = VARLEN.direct(choice, tensors, options)
    return (o, lse) if return_lse else o


def _plain(tensors: tuple[Any, ...], options: tuple[Any, ...], return_lse: bool) -> Any:
    o = plain(tensors, options)  # type: ignore[arg-type]
    return (o, log_sum_exp(tensors, options)) if return_lse else o  # type: ignore[arg-type]
