"""o = softmax(scale · q kᵀ) v without the matrix of scores ever in memory (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tilebook import dispatch
from tilebook.autograd import once
from tilebook.kernels.attention import eager, implementations  # noqa: F401
from tilebook.kernels.attention.drop_in import scaled_dot_product_attention
from tilebook.kernels.attention.form import CAUSAL, PLAIN, Form, form, simplest
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.peers import sdpa, tf32_allowed

__all__ = ["attention", "scaled_dot_product_attention"]

Causal = bool | Literal["top_left", "bottom_right"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        form: Form,
        scale: float,
        choice: dispatch.Choice,
        return_lse: bool,
        *extras: torch.Tensor,
    ) -> Any:
        o, lse = choice(q, k, v, form, scale, *extras)
        ctx.save_for_backward(q, k, v, o, lse, *extras)
        ctx.call = form, scale, choice
        if not return_lse:
            return o
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once
    def backward(ctx: Any, do: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse, *extras = ctx.saved_tensors
        if do.stride(-1) != 1:  # a gradient expanded from a sum, say
            do = do.contiguous()
        form, scale, choice = ctx.call
        dq, dk, dv, *dbias = choice.follow(attention_bwd, (do,), do, q, k, v, o, lse, form, scale, *extras)
        rest = [*dbias, *[None] * len(extras)][: len(extras)]
        return dq, dk, dv, None, None, None, None, *rest


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: dict[str, torch.Tensor | None]) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes tensors of shape (batch, heads, sequence, head dimension); {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k and v must have the same batch size; {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must have the same head dimension; {shapes}")
    if (q.shape[1] % k.shape[1]) if k.shape[1] else q.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of the heads of k and v; {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
    for name, each in extras.items():
        if each is not None and each.device != q.device:
            raise ValueError(f"{name} must be on the device of q; got {each.device} and {q.device}")
    scores = (*q.shape[:3], k.shape[2])
    bias, slopes = extras["bias or attn_mask"], extras["alibi_slopes"]
    if bias is not None and (bias.ndim > 4 or any(n not in (1, m) for n, m in zip(bias.shape[::-1], scores[::-1]))):  # noqa: B905
        raise ValueError(f"bias and attn_mask must broadcast to {scores}; got {tuple(bias.shape)}")
    if slopes is not None and (slopes.dtype != torch.float32 or slopes.shape not in (q.shape[1:2], q.shape[:2])):
        kind = f"{slopes.dtype} {tuple(slopes.shape)}"
        raise ValueError(
            f"alibi_slopes must be fp32 of shape {tuple(q.shape[1:2])} or {tuple(q.shape[:2])}; got {kind}"
        )


def _form(
    q: torch.Tensor, k: torch.Tensor, causal: Causal, window: Any, bias: torch.Tensor | None, **rest: Any
) -> Form:
    """The form of a call, in its simplest terms."""
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"causal must be a bool, 'top_left' or 'bottom_right', not {causal!r}")
    left, right = (-1 if side is None else int(side) for side in (window or (-1, -1)))
    if left < -1 or right < -1:
        raise ValueError(f"window must be two numbers of columns, -1 or None for no limit; got {window}")
    # Without a causal mask there is no alignment in use: FlashAttention's.
    corner = causal == "bottom_right" or not causal
    if q.ndim == k.ndim == 4:
        left, right, corner = simplest(q.shape[2], k.shape[2], left, 0 if causal else right, corner)
    kind = ""
    if bias is not None:
        kind = "mask" if bias.dtype == torch.bool else "dbias" if bias.requires_grad else "bias"
    tf32 = q.dtype == torch.float32 and tf32_allowed()
    return form(left=left, right=right, bottom_right=corner, bias=kind, tf32=tf32, **rest)  # type: ignore[arg-type]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = False,
) -> Any:
    """softmax(scale · q kᵀ) v, with the fastest kernel known for this GPU and these shapes; differentiable once.

    Args:
        q: queries (B, H, Sq, D). Any strides.
        k: keys (B, Hkv, Sk, D). Hkv divides H; query head h reads key/value head h // (H / Hkv).
        v: values (B, Hkv, Sk, D).
        causal: row i sees the columns up to its diagonal. True and "top_left" align it as PyTorch does, row i with
            column i; "bottom_right" as FlashAttention does, the last row with the last column. The same if Sq = Sk.
        scale: what the scores are multiplied by; D^-0.5 if None.
        window: (left, right): row i sees that many columns before and after its diagonal, -1 or None for no limit. The
            diagonal is that of `causal`, and bottom-right without one, as in FlashAttention. Tiles that no row sees are
            skipped.
        softcap: scores s become softcap · tanh(s / softcap), before what follows; 0 is off (Gemma 2).
        alibi_slopes: fp32 (H,) or (B, H): slope · |i + Sk - Sq - j| is taken off the score of row i and column j, as in
            FlashAttention (ALiBi, Press et al. 2022). No gradient.
        bias: added to the scores, any floating dtype, broadcast to (B, H, Sq, Sk). Differentiable; its gradient is made
            at the full size B · H · Sq · Sk in the dtype of the bias, and then summed over what was broadcast.
        attn_mask: booleans, True where a pair takes part, or numbers to add; broadcast to (B, H, Sq, Sk). Hide pairs by
            False or -inf: a row of nothing but the most negative finite number gives the mean of v or 0, and kernels
            make wrong gradients of it.
        dropout_p: probability of dropping a weight, in [0, 1); what stays is divided by 1 - dropout_p. The seed comes
            from the generator of q's device, so `torch.manual_seed` repeats it; nothing else decides what drops.
        return_lse: return (o, lse).
        deterministic: only implementations that give the same bits every time. Ours do, also without.

    Returns:
        o (B, H, Sq, D), in the dtype of q and with its order of axes in memory; with `return_lse` also the natural
        log-sum-exp of each row's scores, (B, H, Sq) in fp32, without gradient. A row that sees nothing has o = 0,
        lse = -inf and gradients 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, and options out of range.

    Kernels take bf16, fp16 and fp32 on a GPU with D a multiple of 8 from 16 to 256 and scale > 0, sums in fp32; fp32
    factors are rounded to tf32 where `torch.backends.cuda.matmul.allow_tf32` has it. Without a verdict that covers
    them they serve bf16 and fp16: full or causal with D a power of two, and what PyTorch would compose (windows,
    soft-cap, ALiBi, dropout, a bias under a causal mask). Everything else, and `torch.compile`, runs the same in
    PyTorch. Under autocast q, k and v are cast as there.

    The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    factor = scale
    if factor is None:
        factor = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 0.0
    extras: tuple[torch.Tensor, ...] = ()
    optional = window or softcap or dropout_p or deterministic or alibi_slopes is not None
    if optional or bias is not None or attn_mask is not None or causal not in (False, True) or q.dtype == torch.float32:
        if not 0 <= dropout_p < 1 or softcap < 0:
            raise ValueError(f"dropout_p must lie in [0, 1) and softcap not be negative; got {dropout_p} and {softcap}")
        bias = _together(bias, attn_mask)
        found = _form(
            q, k, causal, window, bias, softcap=softcap, alibi=alibi_slopes is not None, dropout=dropout_p,
            deterministic=deterministic,
        )  # fmt: skip
        if bias is not None:
            extras += (bias[(None,) * (4 - bias.ndim)],)
        if alibi_slopes is not None:
            extras += (alibi_slopes,)
        if dropout_p:
            extras += (torch.randint(1 << 62, (1,), device=q.device),)
    else:
        found = CAUSAL if causal else PLAIN
    choice = dispatch.known(attention_fwd, q, k, v, found, factor, *extras)
    if choice is None or choice.source == "fallback":
        _check(q, k, v, {"bias or attn_mask": bias, "alibi_slopes": alibi_slopes})
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        usual = q.numel() and k.numel() and factor > 0
        choice = dispatch.find(attention_fwd, q, k, v, found, factor, *extras) if usual else None
        if choice is None:
            return _plain(q, k, v, found, scale, factor, extras, return_lse)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or found.bias == "dbias"):
        return _Attention.apply(q, k, v, found, factor, choice, return_lse, *extras)
    o, lse = choice(q, k, v, found, factor, *extras)
    return (o, lse) if return_lse else o


def _together(bias: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
    """One tensor that does what a bias and a mask do."""
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias must be floating point, not {bias.dtype}")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask must be boolean or floating point, not {mask.dtype}")
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    scale: float | None,
    factor: float,
    extras: tuple[torch.Tensor, ...],
    return_lse: bool,
) -> Any:
    """The same in PyTorch."""
    if not form.composed:
        o = sdpa(q, k, v, form.causal, scale, *extras)
        if not return_lse:
            return o
        with torch.no_grad():
            return o, eager.log_sum_exp(q.float(), k.float(), form, factor, *extras)
    o, lse = eager.composed(q, k, v, form, factor, *extras)
    return (o, lse) if return_lse else o
