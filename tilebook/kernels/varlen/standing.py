"""The op that PyTorch's `torch.nn.attention.varlen.varlen_attn` runs on a GPU, for which ours stand, gradients apart.

It has a kernel of PyTorch's own, FlashAttention-2. Ours serve where verdicts have measured them as faster in both
directions: of a row that sees nothing ours keep -inf, where PyTorch's backward pass wants +inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from tilebook import dispatch
from tilebook.dispatch.snapshot import ahead
from tilebook.kernels.attention.form import form
from tilebook.kernels.attention.pytorch import BOUNDS
from tilebook.kernels.varlen.entry import registered
from tilebook.kernels.varlen.limits import bucket, simplest
from tilebook.layout import rows
from tilebook.native import Standing
from tilebook.native.plans import Empty, Output, contiguous, like

_THEIRS = "flash_attention_2"

_FRACTION = 4
"""A quarter of what the nearest verdict was measured on took an H200 0.64–0.70 of FlashAttention-2's time (forward)."""


def _op(direction: int) -> Any:
    return registered()[direction]


def _another_is_active() -> bool:
    """Has the program put another kernel into FlashAttention-2's place (`activate_flash_attention_impl`)?"""
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()  # from PyTorch 2.11 on
    return active not in (None, "tilebook")


def _packed(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any) -> bool:
    """Are these packed sequences as our kernels take them?"""
    if cu_q is None or cu_k is None or q.ndim != 3 or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not q.dtype == k.dtype == v.dtype or k.shape != v.shape or not (q.numel() and k.numel()):
        return False
    if q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        return False
    return all(
        each.dtype == torch.int32 and each.shape == cu_q.shape and each.ndim == 1 and each.is_contiguous()
        for each in (cu_q, cu_k)
    ) and len(cu_q) > 1  # fmt: skip


def _posed(
    packed: Sequence[Any], longest: Sequence[int], kept: Sequence[Any], causal: bool, scale: Any, sides: Sequence[Any]
) -> tuple[Any, ...] | None:
    """What a call on q, k, v and the ends of the sequences in both, without dropout, is to ours; `kept` follows v."""
    q, k, v, *ends = packed
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    if not _packed(*packed) or not 0 < factor < math.inf or torch.are_deterministic_algorithms_enabled():
        return None
    if _another_is_active():
        return None
    max_q, max_k = map(bucket, longest)
    left, right = (-1 if each is None else each for each in sides)
    left, right, corner = simplest(max_q, max_k, left, 0 if causal else right, True)
    told = form(left=left, right=right, bottom_right=corner)
    return rows(q), rows(k), rows(v), *kept, *ends, max_q, max_k, told, factor


def _ours(choice: Any) -> bool:
    if choice.native:
        return False
    return bool(dispatch.forced() or (ahead(choice, _THEIRS) and _as_much(choice)))


def _as_much(choice: Any) -> bool:
    """Is the call itself measured, or much like what was: not a fraction of its work, of which the start is more?"""
    if choice.source == "exact":
        return True
    measured = choice.implementation.op.problem.from_key(choice.verdict.problem)
    return bool(choice.problem.cost().flops * _FRACTION >= measured.cost().flops)


def _ours_both_ways(choice: Any) -> bool:
    return _ours(choice) and _ours(dispatch.backward_of(choice))


def _forward(args: Sequence[Any]) -> tuple[Any, ...] | None:
    *packed, max_q, max_k, dropout, causal, debug, scale, left, right = args[:13]
    if dropout or debug or any(each is not None for each in args[13:]):
        return None
    return _posed(packed, (max_q, max_k), (), causal, scale, (left, right))


def _backward(args: Sequence[Any]) -> tuple[Any, ...] | None:
    do, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, dropout, causal, _, _, scale, left, right = args
    if dropout or q.ndim != 3 or not do.shape == o.shape == q.shape or not do.dtype == o.dtype == q.dtype:
        return None
    if lse.dtype != torch.float32 or lse.shape != (q.shape[1], q.shape[0]):
        return None
    kept = rows(o), lse.contiguous()
    found = _posed((q, k, v, cu_q, cu_k), (max_q, max_k), kept, causal, scale, (left, right))
    return None if found is None else (rows(do), *found)


def _made(args: Sequence[Any]) -> list[Output]:
    """(output, softmax_logsumexp, rng_state, unused, debug_attn_mask)"""
    q = args[0]
    seeds = Empty((2,), torch.uint64), Empty((), torch.uint64)
    return [like(q), contiguous((q.shape[1], q.shape[0])), *seeds, Empty((0,), q.dtype)]


def _gradients(args: Sequence[Any]) -> list[Output]:
    return [like(each) for each in args[1:4]]


def _long(pairs: float, first: int, ends: int, args: Sequence[Any]) -> bool:
    q, k = args[first : first + 2]
    return bool(q.numel() * k.shape[0] > pairs * (len(args[ends]) - 1))


_NAME = "aten::_flash_attention"
STANDINGS = (
    Standing(
        f"{_NAME}_forward", partial(_op, 0), _forward, (*range(5), *[None] * 4), _made,
        partial(_long, BOUNDS[0], 0, 3), serves=_ours_both_ways,
    ),
    Standing(
        f"{_NAME}_backward", partial(_op, 1), _backward, (*range(8), *[None] * 4), _gradients,
        partial(_long, BOUNDS[1], 1, 6), serves=_ours,
    ),
)  # fmt: skip
"""In PyTorch's own order: (query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
return_debug_mask, scale, window_size_left, window_size_right, …), and with what a forward pass has kept."""
