"""Triton kernels of the backward pass: dk and dv by blocks of columns, dq by blocks of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.tiles import LOG2E, load_tile, place, store_tile


@triton.jit
def _column_step(
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
    scale_log2,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds one block of rows to dk (without the scale) and dv. Scores stand transposed, [BLOCK_N, BLOCK_M]."""
    row = tl.multiple_of(block * BLOCK_M, BLOCK_M)
    q_tile = load_tile(q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, MASKED, DESCRIPTORS)
    st = tl.dot(k_tile, tl.trans(q_tile))
    rows = row + tl.arange(0, BLOCK_M)
    at = pair.to(tl.int64) * n_q + rows
    if MASKED:
        # An infinite log-sum-exp makes p exactly 0 for rows past the end.
        row_lse = tl.load(lse + at, mask=rows < n_q, other=float("inf"))
        row_delta = tl.load(delta + at, mask=rows < n_q, other=0.0)
    else:
        row_lse = tl.load(lse + at)
        row_delta = tl.load(delta + at)
    pt = tl.exp2(st * scale_log2 - (row_lse * LOG2E)[None, :])
    if MASKED and CAUSAL:
        pt = tl.where(rows[None, :] >= (column + tl.arange(0, BLOCK_N))[:, None], pt, 0.0)
    do_tile = load_tile(do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, MASKED, DESCRIPTORS)
    dpt = tl.dot(v_tile, tl.trans(do_tile))
    dv = tl.dot(pt.to(do_tile.dtype), do_tile, dv)
    dst = pt * (dpt - row_delta[None, :])
    dk = tl.dot(dst.to(q_tile.dtype), q_tile, dk)
    return dk, dv


@triton.jit(do_not_specialize=["n_pairs", "n_heads_kv", "group", "n_q", "n_k"])
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
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """dk and dv of one block of columns, over the rows of every query head that shares them."""
    block, kv_pair = place(tl.program_id(0), tl.cdiv(n_k, BLOCK_N), n_pairs, HEADS)
    batch, kv_head = kv_pair // n_heads_kv, kv_pair % n_heads_kv
    column = block * BLOCK_N

    k_tile = load_tile(k, batch, kv_head, column, stride_kb, stride_kh, stride_ks, n_k, BLOCK_N, D, True, DESCRIPTORS)
    v_tile = load_tile(v, batch, kv_head, column, stride_vb, stride_vh, stride_vs, n_k, BLOCK_N, D, True, DESCRIPTORS)
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
    n_masked = clear - first + n_blocks - ragged
    scale_log2 = scale * LOG2E
    for member in range(0, group):
        head = kv_head * group + member
        pair = batch * (n_heads_kv * group) + head
        for index in tl.range(0, n_masked):
            at = tl.where(index < clear - first, first + index, ragged + index - (clear - first))
            dk, dv = _column_step(
                dk, dv, k_tile, v_tile, q, do, lse, delta, batch, head, pair, at, column,
                stride_qb, stride_qh, stride_qs, stride_db, stride_dh, stride_ds, n_q, scale_log2,
                True, CAUSAL, D, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip
        for at in tl.range(clear, ragged):
            dk, dv = _column_step(
                dk, dv, k_tile, v_tile, q, do, lse, delta, batch, head, pair, at, column,
                stride_qb, stride_qh, stride_qs, stride_db, stride_dh, stride_ds, n_q, scale_log2,
                False, CAUSAL, D, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip

    store_tile(dk_out, dk * scale, batch, kv_head, column, stride_dkb, stride_dkh, stride_dks, n_k, BLOCK_N, D)
    store_tile(dv_out, dv, batch, kv_head, column, stride_dvb, stride_dvh, stride_dvs, n_k, BLOCK_N, D)


@triton.jit
def _row_loop(
    dq,
    q_tile,
    do_tile,
    row_lse2,
    row_delta,
    k,
    v,
    batch,
    kv_head,
    first,
    last,
    row,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    n_k,
    scale_log2,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds columns `first` … `last`, in whole blocks, to dq (without the scale)."""
    for column in tl.range(first, last, BLOCK_N):
        column = tl.multiple_of(column, BLOCK_N)
        k_tile = load_tile(
            k, batch, kv_head, column, stride_kb, stride_kh, stride_ks, n_k, BLOCK_N, D, MASKED, DESCRIPTORS
        )
        v_tile = load_tile(
            v, batch, kv_head, column, stride_vb, stride_vh, stride_vs, n_k, BLOCK_N, D, MASKED, DESCRIPTORS
        )
        s = tl.dot(q_tile, tl.trans(k_tile))
        dp = tl.dot(do_tile, tl.trans(v_tile))
        p = tl.exp2(s * scale_log2 - row_lse2[:, None])
        if MASKED:
            # Past the end exp2(0 - lse) may be infinite, and infinity times the zeros of k is not 0.
            columns = column + tl.arange(0, BLOCK_N)
            keep = columns[None, :] < n_k
            if CAUSAL:
                keep &= (row + tl.arange(0, BLOCK_M))[:, None] >= columns[None, :]
            p = tl.where(keep, p, 0.0)
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq)
    return dq


@triton.jit(do_not_specialize=["n_pairs", "n_heads", "group", "n_q", "n_k"])
def attention_bwd_dq(
    q,
    k,
    v,
    do,
    o,
    lse,
    delta,
    dq_out,
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
    stride_ob,
    stride_oh,
    stride_os,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    n_pairs,
    n_heads,
    group,
    n_q,
    n_k,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """dq of one block of rows; also delta, which needs nothing that is not already here and saves a launch."""
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    block, pair = place(tl.program_id(0), n_blocks, n_pairs, HEADS)
    if CAUSAL:
        block = n_blocks - 1 - block  # the last rows see the most columns: start with them
    batch, head = pair // n_heads, pair % n_heads
    kv_head = head // group
    row = block * BLOCK_M

    do_tile = load_tile(do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, True, DESCRIPTORS)
    o_tile = load_tile(o, batch, head, row, stride_ob, stride_oh, stride_os, n_q, BLOCK_M, D, True, False)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    at = pair.to(tl.int64) * n_q + rows
    tl.store(delta + at, row_delta, mask=rows < n_q)
    row_lse2 = tl.load(lse + at, mask=rows < n_q, other=float("inf")) * LOG2E
    q_tile = load_tile(q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, True, DESCRIPTORS)

    last = n_k
    whole = n_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(row + BLOCK_M, n_k)
        whole = tl.minimum(row + 1, n_k) // BLOCK_N * BLOCK_N
    scale_log2 = scale * LOG2E
    dq = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    dq = _row_loop(
        dq, q_tile, do_tile, row_lse2, row_delta, k, v, batch, kv_head, 0, whole, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_k, scale_log2,
        False, CAUSAL, D, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip
    dq = _row_loop(
        dq, q_tile, do_tile, row_lse2, row_delta, k, v, batch, kv_head, whole, last, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_k, scale_log2,
        True, CAUSAL, D, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip
    store_tile(dq_out, dq * scale, batch, head, row, stride_dqb, stride_dqh, stride_dqs, n_q, BLOCK_M, D)
