"""Attention of packed sequences of any lengths, none of which sees another (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tilebook import dispatch
from tilebook.autograd import once
from tilebook.kernels.attention import peers
from tilebook.kernels.attention.form import Form, form
from tilebook.kernels.varlen.check import check
from tilebook.kernels.varlen.ops import Pair, attention_varlen_bwd, attention_varlen_fwd, torch_backward, torch_forward
from tilebook.kernels.varlen.problem import simplest

__all__ = ["attention_varlen"]


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, choice: dispatch.Choice | None, *args: Any) -> Pair:
        o, lse = choice(*args) if choice is not None else torch_forward(*args)
        q, k, v, cu_q, cu_k, *rest = args
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k)
        ctx.call = choice, rest
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once
    def backward(ctx: Any, do: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if do.stride(-1) != 1:  # a gradient expanded from a sum, say
            do = do.contiguous()
        choice, rest = ctx.call
        args = do, *ctx.saved_tensors, *rest
        grads = choice.follow(attention_varlen_bwd, (do,), *args) if choice is not None else torch_backward(*args)
        return None, *grads, *[None] * 6


def _form(
    causal: bool | str, window: Any, softcap: float, max_q: int, max_k: int, tf32: bool, deterministic: bool
) -> Form:
    """The form of a call, in its simplest terms."""
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"causal must be a bool, 'bottom_right' or 'top_left', not {causal!r}")
    left, right = (-1 if side is None else int(side) for side in (window or (-1, -1)))
    if left < -1 or right < -1:
        raise ValueError(f"window must be two numbers of columns, -1 or None for no limit; got {window}")
    if softcap < 0:
        raise ValueError(f"softcap must not be negative; got {softcap}")
    left, right, corner = simplest(max_q, max_k, left, 0 if causal else right, causal != "top_left")
    return form(left=left, right=right, bottom_right=corner, softcap=softcap, tf32=tf32, deterministic=deterministic)


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
    a call follows the lengths. Without a verdict that covers a call they serve bf16 and fp16 with D 128.
    Everything else, and `torch.compile`, runs the same in PyTorch, a sequence at a time, and has to wait for the
    lengths. Under autocast q, k and v are cast as there.

    The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    factor = scale
    if factor is None:
        factor = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 0.0
    # Rounded up, so that packs whose longest sequences differ a little are one call to dispatch.
    max_q, max_k = (1 << max(0, n - 1).bit_length() if isinstance(n, int) else n for n in (max_seqlen_q, max_seqlen_k))
    tf32 = q.dtype == torch.float32 and peers.tf32_allowed()
    found = _form(causal, window, softcap, max_q, max_k, tf32, deterministic)
    args = q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, found, factor
    choice = dispatch.known(attention_varlen_fwd, *args)
    if choice is None or choice.source == "fallback":
        check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        args = q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, found, factor
        usual = q.numel() and k.numel() and len(cu_seqlens_q) > 1 and factor > 0
        choice = dispatch.find(attention_varlen_fwd, *args) if usual else None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        o, lse = _Varlen.apply(choice, *args)
    else:
        o, lse = choice(*args) if choice is not None else torch_forward(*args)
    return (o, lse) if return_lse else o
