"""o = softmax(scale · q kᵀ) v without the matrix of scores ever in memory (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import left_whole, recorded, tf32_allowed, way
from tilebook.casting import autocast
from tilebook.kernels.attention.check import Causal, check, checked_form, multiplier, numbers, together
from tilebook.kernels.attention.drop_in import kind, scaled_dot_product_attention
from tilebook.kernels.attention.entry import ATTENTION, arguments, posed, registered
from tilebook.kernels.attention.form import CAUSAL, PLAIN
from tilebook.kernels.attention.pytorch import BOUNDS, TRACED, log_sum_exp, plain, sdpa
from tilebook.kernels.attention.pytorch import scaled_dot_product_attention as plain_sdpa
from tilebook.layout import aligned, rows
from tilebook.left import ORDINARY, again, gated, keep, known, recall, unsettled
from tilebook.traced import described, left

__all__ = ["attention", "scaled_dot_product_attention"]


Pair = tuple[torch.Tensor, torch.Tensor]
"""(o, lse)"""


class Options(TypedDict, total=False):
    """What `attention` is told beside its tensors and `return_lse`, which decides what it returns."""

    causal: Causal
    scale: float | None
    window: tuple[int | None, int | None] | None
    softcap: float
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None
    attn_mask: torch.Tensor | None
    dropout_p: float
    deterministic: bool
    approx: Literal["auto"] | None


_approximating: dict[str, Any] = {}
"""The module that has features in the place of softmax, once it is loaded: it is made of families that are made of this
one."""


def _can_approximate() -> bool:
    _approximating["module"] = importlib.import_module("tilebook.approximation")
    return True


_can_approximate._dynamo_marked_constant = True  # type: ignore[attr-defined]


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[Options]
) -> torch.Tensor: ...
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]) -> Pair: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[Options]
) -> torch.Tensor | Pair: ...
@gated("attention")
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
    approx: Literal["auto"] | None = None,
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
            FlashAttention (ALiBi, Press et al. 2022). Where they want a gradient, PyTorch composes the call.
        bias: added to the scores, any floating dtype, broadcast to (B, H, Sq, Sk). Differentiable; its gradient is made
            at the full size B · H · Sq · Sk in the dtype of the bias, and then summed over what was broadcast.
        attn_mask: booleans, True where a pair takes part, or numbers to add; broadcast to (B, H, Sq, Sk). Hide pairs by
            False or -inf: a row of nothing but the most negative finite number gives the mean of v or 0, and kernels
            make wrong gradients of it.
        dropout_p: probability of dropping a weight, in [0, 1); what stays is divided by 1 - dropout_p. The seed comes
            from the generator of q's device, so `torch.manual_seed` repeats it; nothing else decides what drops.
        return_lse: return (o, lse).
        deterministic: only implementations that give the same bits every time. Ours do, also without.
        approx: "auto" lets causal self-attention without windows, soft-cap, biases, masks, dropout and lse be
            *approximated*, by 64 random features (Performer), from the length on from which that was measured to be
            faster on this GPU (`tilebook bench crossover`); it says so once. Exact where nobody has measured, and
            always without.

    Returns:
        o (B, H, Sq, D), in the dtype of q and with its order of axes in memory; with `return_lse` also the natural
        log-sum-exp of each row's scores, (B, H, Sq) in fp32, without gradient. A row that sees nothing has o = 0,
        lse = -inf and gradients 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, and options out of range.

    Kernels take bf16, fp16 and fp32 on a GPU with D a multiple of 8 from 16 to 256 and scale > 0, sums in fp32; fp32
    factors are rounded to tf32 where `torch.backends.cuda.matmul.allow_tf32` has it. What PyTorch has a fused kernel
    for, masks and biases that do not learn among it, is its own call, forward and backward, unless a verdict for this
    very problem, measured on this GPU, has another ahead. What PyTorch would compose in bf16 or fp16 (windows,
    soft-cap, ALiBi, dropout, a bias under a causal mask) runs in our kernels. Everything else is PyTorch. Under
    `torch.compile` a call is the op `tilebook::attention_fwd`, which chooses when it runs. Under autocast q, k and v
    are cast as there.

    The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
    """
    optional = window is not None or alibi_slopes is not None or bias is not None or attn_mask is not None
    if approx is not None:
        if approx != "auto":
            raise ValueError(f'approx must be None or "auto", not {approx!r}')
        plainly = not (optional or softcap or dropout_p or return_lse) and causal is not False
        if plainly and not has_torch_function((q, k, v)) and _can_approximate():
            found = _approximating["module"].attend(q, k, v, scale, recorded((q, k, v)))
            if found is not None:
                return found
    usual = not (optional or softcap or dropout_p or return_lse or deterministic) and (
        causal is False or causal is True
    )
    ordinary = (scale is None or (type(scale) is float and scale > 0)) and type(q) is type(k) is type(v) is torch.Tensor
    usual = usual and ordinary
    known_as: tuple[Any, Any, torch.Tensor | None] | None = None
    if usual:
        near = q.shape, causal
        if again(near, q, k, v) or recall(own := kind(q, k, v, causal), near, q, k, v):  # type: ignore[arg-type]
            return plain_sdpa(q, k, v, None, 0.0, causal, scale=scale, enable_gqa=q.size(1) != k.size(1))
        known_as = own, near, None
    elif ordinary and causal is False and not (softcap or dropout_p or return_lse or deterministic):
        mask = bias if attn_mask is None else attn_mask
        alone = window is None and alibi_slopes is None and (bias is None or attn_mask is None)
        if alone and type(mask) in ORDINARY and mask.ndim == 4:  # type: ignore[union-attr]
            own_kind, near_kind = _masked_kind(q, k, v, mask, bias is None)  # type: ignore[arg-type]
            if again(near_kind, q, k, v, mask) or recall(own_kind, near_kind, q, k, v, mask):  # type: ignore[arg-type]
                return sdpa(q, k, v, False, scale, mask)
            known_as = own_kind, near_kind, mask
    others = bias, attn_mask, alibi_slopes
    if has_torch_function((q, k, v, *others)):
        if type(attn_mask).__name__ == "CausalBias" and bias is None and not causal:
            causal, attn_mask = _alignment(attn_mask), None
        else:
            return handle_torch_function(
                attention, (q, k, v, *others), q, k, v, causal=causal, scale=scale, window=window, softcap=softcap,
                alibi_slopes=alibi_slopes, bias=bias, attn_mask=attn_mask, dropout_p=dropout_p, return_lse=return_lse,
                deterministic=deterministic, approx=approx,
            )  # fmt: skip
    return attend(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, bias=bias,
        attn_mask=attn_mask, dropout_p=dropout_p, return_lse=return_lse, deterministic=deterministic, usual=usual,
        known_as=known_as,
    )  # fmt: skip


def attend(
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
    usual: bool = False,
    known_as: tuple[Any, Any, torch.Tensor | None] | None = None,
    theirs: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    """`attention` of tensors of which none overrides PyTorch's functions.

    usual: is all but `causal` and `scale` what it is by default?
    known_as: what `tilebook.left` is to know such calls by, their kind, what is near it and the mask, if it may.
    theirs: computes a call that is PyTorch's to serve, of q, k and v, instead of `plain`.
    """
    others = bias, attn_mask, alibi_slopes
    found_way = way(q, k, v, optional=others)
    given = q, k, v
    q, k, v = autocast(*given)
    if q is not given[0] or k is not given[1] or v is not given[2]:
        known_as = None
    table: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    if usual and q.dtype != torch.float32 and not torch.are_deterministic_algorithms_enabled():
        form = CAUSAL if causal else PLAIN
    else:
        scale = numbers(scale, softcap, dropout_p)
        bias = together(bias, attn_mask)
        form = checked_form(
            q, k, causal, window, bias, softcap=float(softcap), alibi=alibi_slopes is not None,
            dropout=float(dropout_p),
            tf32=q.dtype == torch.float32 and tf32_allowed(),
            deterministic=bool(deterministic) or torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        seed = torch.randint(1 << 62, (1,), device=q.device) if dropout_p else None
        table = bias if bias is None else _four(bias)
    factor = multiplier(scale, q)
    extras = table, alibi_slopes, seed
    learnt = alibi_slopes is not None and recorded((alibi_slopes,))
    tensors, options = (q, k, v, *extras), (form, factor)

    def pytorchs(*qkv: torch.Tensor) -> torch.Tensor:
        return theirs(*qkv) if theirs is not None else plain((*qkv, *extras), (form, scale))

    choice = None
    if found_way == "direct" and not learnt:
        choice = dispatch.known(registered()[0], arguments(tensors, options))
    if choice is None:
        check(q, k, v, bias, alibi_slopes)
        some = q.numel() and k.numel() and factor > 0
        if found_way == "pytorch" or not some or learnt:
            return _plain(tensors, (form, scale), factor, return_lse)
        q, k, v = rows(q), rows(k), rows(v)
        tensors = (q, k, v, *extras)
        if found_way == "op":
            packed = ATTENTION.pack(options)
            if not return_lse and (
                _left(tensors, packed) or ATTENTION.left_to_pytorch(lambda: posed(tensors, packed), tensors)
            ):
                return pytorchs(q, k, v)
            o, lse = ATTENTION.through(tensors, options)
            return (o, lse) if return_lse else o
        choice = dispatch.lookup(registered()[0], arguments(tensors, options))
    if known_as is not None and unsettled(known_as[0], choice):
        mask = known_as[2]
        size = q.numel() * k.shape[2] * (1 if mask is None else 2)  # PyTorch's kernels take twice as long under a mask
        keep(known_as[0], known(choice, size, BOUNDS))
        if recall(*known_as[:2], q, k, v, *([] if mask is None else [mask])):
            return pytorchs(q, k, v)
    if not return_lse and left_whole(choice, tensors):
        choice.calls += 1
        return pytorchs(q, k, v) if choice.aligned else pytorchs(aligned(q), aligned(k), aligned(v))
    o, lse = ATTENTION.direct(choice, tensors, options)
    return (o, lse) if return_lse else o


def _plain(tensors: tuple[Any, ...], options: tuple[Any, Any], factor: float, return_lse: bool) -> Any:
    o = plain(tensors, options)
    return (o, log_sum_exp(tensors, (options[0], factor))) if return_lse else o


def _left(tensors: tuple[Any, ...], packed: tuple[Any, ...]) -> bool:
    """Is a call that is being traced PyTorch's own to serve? A call of no known size is the op's, which looks then."""
    if not torch.compiler.is_compiling():
        return False
    q, k, *_ = tensors
    found, trained = described(*tensors), recorded(tensors)
    if found is None or dispatch.forced():
        return False
    bound = TRACED[1] if trained else TRACED[0]  # PyTorch 2.11 does not trace an index that is a bool
    return left("attention", found, packed, trained, q.device, q.numel() * k.shape[2] <= bound)


def _masked_kind(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, booleans: bool
) -> tuple[Any, Any]:
    """What `tilebook.left` is to know calls with a mask or bias by; booleans: may they be, as a bias may not?"""
    of = mask.requires_grad, booleans
    return (*of, *kind(q, k, v, False, mask)), (*of, q.shape, mask.shape, mask.dtype)


def _four(bias: torch.Tensor) -> torch.Tensor:
    """The bias with axes of length 1 in front, four in all."""
    for _ in range(4 - bias.ndim):
        bias = bias.unsqueeze(0)
    return bias


def _alignment(mask: Any) -> Causal:
    """Where the diagonal of PyTorch's `CausalBias` starts or ends."""
    return "top_left" if mask.variant.name == "UPPER_LEFT" else "bottom_right"
