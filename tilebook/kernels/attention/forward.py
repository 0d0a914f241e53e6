"""o = softmax(scale · q kᵀ) v and each row's log-sum-exp, in one pass over k and v (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.forward_space import MADE_BY_KERNEL, SPACE, proven, supports
from tilebook.kernels.attention.ops import attention_fwd
from tilebook.kernels.attention.scores import (
    columns_seen,
    looked_up,
    options,
    scored,
    survives,
    within,
)
from tilebook.kernels.attention.tiles import (
    LN2,
    LOG2E,
    addressable,
    capped,
    describable,
    describe,
    like,
    load_tile,
    offset,
    place,
    rounded,
    store_tile,
)
from tilebook.launch import launch
from tilebook.op import Config


@triton.jit
def highest(s, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The maximum of each row. A thread's columns of a row are every eighth and its neighbour: maxima of those first
    are two short chains of instructions for a long one. Wide heads have no registers left for it."""
    if WIDTH <= 64:
        s = tl.max(tl.reshape(s, [BLOCK_M, BLOCK_N // 8, 8]), 1)
    return tl.max(s, 1)


@triton.jit
def attend(
    acc,
    weight,
    peak,
    q,
    k,
    v,
    batch,
    kv_head,
    pair,
    first,
    last,
    row,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    n_q,
    n_k,
    scale,
    extras,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    SCORED: tl.constexpr,
    GAPS: tl.constexpr,
    TF32: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Columns `first` … `last`, in whole blocks: the running Σ p v, Σ p and maximum of each row.

    `scale` brings scores to powers of two, and maxima are in them; where something is done to the scores themselves
    (`SCORED`) both are in natural units, and differences are taken first: biases may be huge. Up to 64 wide, Σ p is in
    eight parts a row, which meet when all is added up.
    """
    before, after, mask, _bias, base, stride_bm, stride_bn, _slope, _softcap, seed, dropout = extras
    for column in tl.range(first, last, BLOCK_N):
        column = tl.multiple_of(column, BLOCK_N)
        k_tile = load_tile(
            k, batch, kv_head, column, stride_kb, stride_kh, stride_ks, n_k, BLOCK_N, D, WIDTH, MASKED, DESCRIPTORS
        )
        s = tl.dot(q, tl.trans(rounded(k_tile, TF32)), allow_tf32=TF32)
        if SCORED:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            s, _bent = scored(s, row, column, at_rows, at_columns, n_q, n_k, scale, extras)
        if MASKED:
            columns = column + tl.arange(0, BLOCK_N)
            keep = columns[None, :] < n_k
            if CAUSAL:
                keep &= (row + tl.arange(0, BLOCK_M))[:, None] >= columns[None, :]
            if BANDED:
                keep &= within((row + tl.arange(0, BLOCK_M))[:, None], columns[None, :], before, after)
            s = tl.where(keep, s, -float("inf"))
        if mask is not None:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            part = looked_up(mask + base, row, column, at_rows, at_columns, stride_bm, stride_bn, n_q, n_k)
            s = tl.where(part, s, -float("inf"))
        if SCORED:
            higher = tl.maximum(peak, highest(s, WIDTH, BLOCK_M, BLOCK_N))
            ground = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2((s - ground[:, None]) * LOG2E)
            decay = tl.exp2((peak - ground) * LOG2E)
        else:
            # Column 0 is visited first and no mask hides it, so the maximum is finite from then on; unless there are
            # gaps, and then the maximum of nothing must not meet itself: ∞ - ∞ is not 0.
            higher = tl.maximum(peak, highest(s, WIDTH, BLOCK_M, BLOCK_N) * scale)
            ground = higher
            if GAPS:
                ground = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(s * scale - ground[:, None])
            decay = tl.exp2(peak - ground)
        if WIDTH <= 64:  # noqa: SIM108
            total = tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // 8, 8]), 1)
        else:
            total = tl.sum(p, 1)
        if seed is not None:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where(survives(at_rows, at_columns, pair, seed, dropout), p, 0.0)
        acc = acc * decay[:, None]
        v_tile = load_tile(
            v, batch, kv_head, column, stride_vb, stride_vh, stride_vs, n_k, BLOCK_N, D, WIDTH, MASKED, DESCRIPTORS
        )
        acc = tl.dot(rounded(p.to(v_tile.dtype), TF32), rounded(v_tile, TF32), acc, allow_tf32=TF32)
        weight = weight * (decay[:, None] if WIDTH <= 64 else decay) + total
        peak = higher
    return acc, weight, peak


@triton.jit(do_not_specialize=["n_pairs", "n_heads", "group", "n_q", "n_k", "before", "after"])
def _attention_fwd(
    q, k, v, o, lse,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    n_pairs, n_heads, group, n_q, n_k, scale, before, after, mask, bias, stride_bb, stride_bh, stride_bm, stride_bn,
    slopes, stride_ab, stride_ah, softcap, seed, dropout,
    CAUSAL: tl.constexpr, BANDED: tl.constexpr, SCORED: tl.constexpr, GAPS: tl.constexpr, TF32: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MADE: tl.constexpr,
):  # fmt: skip
    """o and lse of one block of rows. With `MADE` q, k and v are pointers, of which each program makes its tensor
    descriptors."""
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    block, pair = place(tl.program_id(0), n_blocks, n_pairs, HEADS)
    if CAUSAL or (after is not None and before is None):
        block = n_blocks - 1 - block  # the last rows see the most columns: start with them
    batch, head = pair // n_heads, pair % n_heads
    kv_head = head // group
    row = block * BLOCK_M
    if MADE:
        n_batch, n_kv = n_pairs // n_heads, n_heads // group
        k = tl.make_tensor_descriptor(
            k, [n_batch, n_kv, n_k, WIDTH], [stride_kb, stride_kh, stride_ks, 1], [1, 1, BLOCK_N, D]
        )
        v = tl.make_tensor_descriptor(
            v, [n_batch, n_kv, n_k, WIDTH], [stride_vb, stride_vh, stride_vs, 1], [1, 1, BLOCK_N, D]
        )
        q = tl.make_tensor_descriptor(
            q, [n_batch, n_heads, n_q, WIDTH], [stride_qb, stride_qh, stride_qs, 1], [1, 1, BLOCK_M, D]
        )

    q_tile = load_tile(q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS)
    q_tile = rounded(q_tile, TF32)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    weight = tl.zeros([BLOCK_M, 8] if WIDTH <= 64 else [BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)

    last = n_k
    whole = n_k // BLOCK_N * BLOCK_N  # columns before this one need no mask
    if CAUSAL:
        last = tl.minimum(row + BLOCK_M, n_k)
        whole = tl.minimum(row + 1, n_k) // BLOCK_N * BLOCK_N
    if BANDED:
        first, clear, whole, last = columns_seen(row, BLOCK_M, n_k, before, after)
        first = first // BLOCK_N * BLOCK_N
        clear = tl.minimum(tl.cdiv(clear, BLOCK_N) * BLOCK_N, tl.cdiv(last, BLOCK_N) * BLOCK_N)
        whole = tl.maximum(whole // BLOCK_N * BLOCK_N, clear)
    factor = scale * LOG2E
    if SCORED:
        factor = scale
    if seed is not None:
        seed = tl.load(seed)
    extras = (
        before, after, mask, bias, None if stride_bb is None else offset(batch, head, stride_bb, stride_bh),
        stride_bm, stride_bn, None if slopes is None else tl.load(slopes + batch * stride_ab + head * stride_ah),
        softcap, seed, dropout,
    )  # fmt: skip
    if before is not None:
        acc, weight, peak = attend(
            acc, weight, peak, q_tile, k, v, batch, kv_head, pair, first, clear, row,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
            True, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
        )  # fmt: skip
    acc, weight, peak = attend(
        acc, weight, peak, q_tile, k, v, batch, kv_head, pair, clear if BANDED else 0, whole, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
        False, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip
    acc, weight, peak = attend(
        acc, weight, peak, q_tile, k, v, batch, kv_head, pair, whole, last, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
        True, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip

    if WIDTH <= 64:
        weight = tl.sum(weight, 1)
    share = weight
    if GAPS:
        share = tl.where(weight == 0.0, 1.0, weight)  # a row that sees nothing is 0, and its log-sum-exp -inf
    if dropout is not None:
        share = share * (1.0 - dropout)
    store_tile(o, acc / share[:, None], batch, head, row, stride_ob, stride_oh, stride_os, n_q, BLOCK_M, D, WIDTH)
    rows = row + tl.arange(0, BLOCK_M)
    at = lse + pair.to(tl.int64) * n_q + rows
    total = peak + tl.log2(weight) * LN2 if SCORED else (peak + tl.log2(weight)) * LN2
    tl.store(at, total, mask=rows < n_q)


@attention_fwd.implementation("triton", space=SPACE, supports=supports, proven=proven)
def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    scale: float,
    *extras: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = addressable(q), addressable(k), addressable(v)
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    o, lse = like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    rows, columns = config.number("BLOCK_M"), config.number("BLOCK_N")
    descriptors = bool(config["DESCRIPTORS"]) and describable(q, k, v)
    made = descriptors and config["DESCRIPTORS"] == MADE_BY_KERNEL
    loaded: tuple[Any, ...] = q, k, v
    if descriptors and not made:
        loaded = describe(q, rows), describe(k, columns), describe(v, columns)
    launch(
        _attention_fwd,
        (triton.cdiv(n_q, rows) * batch * heads,),
        *loaded,
        o,
        lse,
        *(step for x in (q, k, v, o) for step in x.stride()[:3]),
        batch * heads,
        heads,
        heads // heads_kv,
        n_q,
        n_k,
        scale,
        **options(form, extras, q, k),
        BLOCK_M=rows,
        BLOCK_N=columns,
        HEADS=config["HEADS"],
        DESCRIPTORS=descriptors,
        MADE=made,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **capped(int(config.get("MAXNREG", 0))),
    )
    return o, lse
