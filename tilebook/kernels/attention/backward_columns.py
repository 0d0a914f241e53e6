"""Triton kernel of the backward pass by blocks of columns: dk and dv."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.scores import looked_up, rows_seen, scored, survives, within
from tilebook.kernels.attention.tiles import LOG2E, load_tile, offset, place, rounded, store_tile


@triton.jit
def column_step(
    dk,
    dv,
    k_tile,
    v_tile,
    q,
    do,
    lse,
    delta,
    batch,
    head,
    pair,
    block,
    column,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_db,
    stride_dh,
    stride_ds,
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
    """Adds one block of rows to dk (without the scale) and dv. Scores stand transposed, [BLOCK_N, BLOCK_M].

    `scale` brings scores to powers of two, or with `SCORED` to natural units, as in the forward pass.
    """
    before, after, mask, _bias, base, stride_bm, stride_bn, _slope, softcap, seed, dropout = extras
    row = tl.multiple_of(block * BLOCK_M, BLOCK_M)
    q_tile = load_tile(
        q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, MASKED, DESCRIPTORS
    )
    q_tile = rounded(q_tile, TF32)
    st = tl.dot(k_tile, tl.trans(q_tile), allow_tf32=TF32)
    rows = row + tl.arange(0, BLOCK_M)
    at = pair.to(tl.int64) * n_q + rows
    if MASKED:
        # An infinite log-sum-exp makes p exactly 0 for rows past the end.
        row_lse = tl.load(lse + at, mask=rows < n_q, other=float("inf"))
        row_delta = tl.load(delta + at, mask=rows < n_q, other=0.0)
    else:
        row_lse = tl.load(lse + at)
        row_delta = tl.load(delta + at)
    if GAPS:
        row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)  # a row that saw nothing: p is 0 again
    if SCORED:
        at_rows, at_columns = rows[None, :], (column + tl.arange(0, BLOCK_N))[:, None]
        st, bent = scored(st, row, column, at_rows, at_columns, n_q, n_k, scale, extras)
        pt = tl.exp2((st - row_lse[None, :]) * LOG2E)
    else:
        pt = tl.exp2(st * scale - (row_lse * LOG2E)[None, :])
    if MASKED and CAUSAL:
        pt = tl.where(rows[None, :] >= (column + tl.arange(0, BLOCK_N))[:, None], pt, 0.0)
    elif MASKED and BANDED:
        pt = tl.where(within(rows[None, :], (column + tl.arange(0, BLOCK_N))[:, None], before, after), pt, 0.0)
    if mask is not None:
        at_rows, at_columns = rows[None, :], (column + tl.arange(0, BLOCK_N))[:, None]
        pt = tl.where(looked_up(mask + base, row, column, at_rows, at_columns, stride_bm, stride_bn, n_q, n_k), pt, 0.0)
    do_tile = load_tile(
        do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, WIDTH, MASKED, DESCRIPTORS
    )
    do_tile = rounded(do_tile, TF32)
    dpt = tl.dot(v_tile, tl.trans(do_tile), allow_tf32=TF32)
    used = pt
    if seed is not None:
        alive = survives(rows[None, :], (column + tl.arange(0, BLOCK_N))[:, None], pair, seed, dropout)
        used = tl.where(alive, pt, 0.0)
        dpt = tl.where(alive, dpt / (1.0 - dropout), 0.0)
    dv = tl.dot(rounded(used.to(do_tile.dtype), TF32), do_tile, dv, allow_tf32=TF32)
    dst = pt * (dpt - row_delta[None, :])
    if softcap is not None:
        dst = dst * (1.0 - bent * bent)
    dk = tl.dot(rounded(dst.to(q_tile.dtype), TF32), q_tile, dk, allow_tf32=TF32)
    return dk, dv


@triton.jit(do_not_specialize=["n_pairs", "n_heads_kv", "group", "n_q", "n_k", "before", "after"])
def attention_bwd_dkdv(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk_out,
    dv_out,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_db,
    stride_dh,
    stride_ds,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    n_pairs,
    n_heads_kv,
    group,
    n_q,
    n_k,
    scale,
    before,
    after,
    mask,
    bias,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    slopes,
    stride_ab,
    stride_ah,
    softcap,
    seed,
    dropout,
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    SCORED: tl.constexpr,
    GAPS: tl.constexpr,
    TF32: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """dk and dv of one block of columns, over the rows of every query head that shares them."""
    block, kv_pair = place(tl.program_id(0), tl.cdiv(n_k, BLOCK_N), n_pairs, HEADS)
    batch, kv_head = kv_pair // n_heads_kv, kv_pair % n_heads_kv
    column = block * BLOCK_N

    k_tile = load_tile(
        k, batch, kv_head, column, stride_kb, stride_kh, stride_ks, n_k, BLOCK_N, D, WIDTH, True, DESCRIPTORS
    )
    v_tile = load_tile(
        v, batch, kv_head, column, stride_vb, stride_vh, stride_vs, n_k, BLOCK_N, D, WIDTH, True, DESCRIPTORS
    )
    k_tile, v_tile = rounded(k_tile, TF32), rounded(v_tile, TF32)
    dk = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, D], dtype=tl.float32)

    # Blocks of rows: those of the diagonal and the ragged last one need masks; those between them do not.
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    first = 0
    clear = 0
    if CAUSAL:
        first = tl.minimum(column // BLOCK_M, n_blocks)
        clear = tl.minimum(tl.cdiv(column + BLOCK_N - 1, BLOCK_M), n_blocks)
    ragged = tl.maximum(n_q // BLOCK_M, clear)
    end = n_blocks
    if BANDED:
        first, clear, ragged, end = rows_seen(column, BLOCK_N, n_q, before, after)
        first, end = first // BLOCK_M, tl.cdiv(end, BLOCK_M)
        clear = tl.maximum(tl.minimum(tl.cdiv(clear, BLOCK_M), end), first)
        ragged = tl.maximum(tl.minimum(ragged // BLOCK_M, end), clear)
    n_masked = clear - first + end - ragged
    factor = scale * LOG2E
    if SCORED:
        factor = scale
    if seed is not None:
        seed = tl.load(seed)
    for member in range(0, group):
        head = kv_head * group + member
        pair = batch * (n_heads_kv * group) + head
        extras = (
            before, after, mask, bias, None if stride_bb is None else offset(batch, head, stride_bb, stride_bh),
            stride_bm, stride_bn, None if slopes is None else tl.load(slopes + batch * stride_ab + head * stride_ah),
            softcap, seed, dropout,
        )  # fmt: skip
        # What LLVM takes out of a loop, descriptors of shared memory above all, fills registers: wide tiles spill.
        for index in tl.range(0, n_masked, disable_licm=D >= 128):
            at = tl.where(index < clear - first, first + index, ragged + index - (clear - first))
            dk, dv = column_step(
                dk, dv, k_tile, v_tile, q, do, lse, delta, batch, head, pair, at, column,
                stride_qb, stride_qh, stride_qs, stride_db, stride_dh, stride_ds, n_q, n_k, factor, extras,
                True, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip
        for at in tl.range(clear, ragged, disable_licm=D >= 128):
            dk, dv = column_step(
                dk, dv, k_tile, v_tile, q, do, lse, delta, batch, head, pair, at, column,
                stride_qb, stride_qh, stride_qs, stride_db, stride_dh, stride_ds, n_q, n_k, factor, extras,
                False, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip

    if dropout is not None:
        dv = dv / (1.0 - dropout)
    store_tile(dk_out, dk * scale, batch, kv_head, column, stride_dkb, stride_dkh, stride_dks, n_k, BLOCK_N, D, WIDTH)
    store_tile(dv_out, dv, batch, kv_head, column, stride_dvb, stride_dvh, stride_dvs, n_k, BLOCK_N, D, WIDTH)
