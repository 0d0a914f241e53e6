"""Triton kernels of the backward pass in five products: by blocks of columns, with dq added up in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.scores import rows_seen, within
from tilebook.kernels.attention.tiles import LOG2E, load_tile, place, store_tile


@triton.jit
def attention_bwd_prepare(
    do,
    o,
    lse,
    statistics,
    sums,
    stride_db,
    stride_dh,
    stride_ds,
    stride_ob,
    stride_oh,
    stride_os,
    n_heads,
    n_q,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of one block of rows: delta, the log-sum-exp in powers of two, and the zeros that dq's sums start from.

    Rows past the end get such numbers that p and ds come out 0: so do those that saw nothing.
    """
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    tile = tl.program_id(0)
    pair = tile // n_blocks
    row = tile % n_blocks * BLOCK_M
    batch, head = pair // n_heads, pair % n_heads
    do_tile = load_tile(do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, WIDTH, True, False)
    o_tile = load_tile(o, batch, head, row, stride_ob, stride_oh, stride_os, n_q, BLOCK_M, D, WIDTH, True, False)
    delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    row_lse = tl.load(lse + pair.to(tl.int64) * n_q + rows, mask=rows < n_q, other=float("inf"))
    row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
    at = statistics + tile.to(tl.int64) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(at, row_lse * LOG2E)
    tl.store(at + BLOCK_M, delta)
    inside = tl.arange(0, D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(sums + tile.to(tl.int64) * (BLOCK_M * D) + inside, tl.zeros([D, BLOCK_M], tl.float32))


@triton.jit
def _statistics(statistics, tile, BLOCK_M: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Log-sum-exp and delta of block of rows `tile`. By descriptor, no thread holds addresses of them."""
    if DESCRIPTORS:
        row_lse = statistics.load([tile * (2 * BLOCK_M)])
        row_delta = statistics.load([tile * (2 * BLOCK_M) + BLOCK_M])
    else:
        at = statistics + tile.to(tl.int64) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
        row_lse = tl.load(at)
        row_delta = tl.load(at + BLOCK_M)
    return row_lse, row_delta


@triton.jit
def _add(sums, part, tile, DESCRIPTORS: tl.constexpr):
    """Adds a part of dqᵀ to the sums of block of rows `tile`; no order is kept."""
    D: tl.constexpr = part.shape[0]
    BLOCK_M: tl.constexpr = part.shape[1]
    if DESCRIPTORS:
        sums.atomic_add([tile * D, 0], part)
    else:
        inside = tl.arange(0, D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.atomic_add(sums + tile.to(tl.int64) * (BLOCK_M * D) + inside, part, sem="relaxed")


@triton.jit
def _step(
    dk,
    dv,
    k_tile,
    v_tile,
    q,
    do,
    statistics,
    sums,
    batch,
    head,
    first_tile,
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
    before,
    after,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Adds one block of rows to dk (without the scale) and dv, and its part of dq (without the scale) to the sums.

    Scores stand transposed, [BLOCK_N, BLOCK_M], and so does dq, [D, BLOCK_M]: then no product's operand is turned in
    registers. That part comes before dk, whose product runs while it is added.
    """
    row = tl.multiple_of(block * BLOCK_M, BLOCK_M)
    q_tile = load_tile(
        q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, MASKED, DESCRIPTORS
    )
    st = tl.dot(k_tile, tl.trans(q_tile))
    do_tile = load_tile(
        do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, WIDTH, MASKED, DESCRIPTORS
    )
    dpt = tl.dot(v_tile, tl.trans(do_tile))
    tile = first_tile + block
    row_lse, row_delta = _statistics(statistics, tile, BLOCK_M, DESCRIPTORS)
    pt = tl.exp2(st * scale - row_lse[None, :])
    if MASKED:
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        # Past the end exp2(0 - lse) may be infinite, and infinity times the zeros of k is not 0.
        keep = columns[:, None] < n_k
        if CAUSAL:
            keep &= rows[None, :] >= columns[:, None]
        if BANDED:
            keep &= within(rows[None, :], columns[:, None], before, after)
        pt = tl.where(keep, pt, 0.0)
    dv = tl.dot(pt.to(do_tile.dtype), do_tile, dv)
    dst = (pt * (dpt - row_delta[None, :])).to(q_tile.dtype)
    part = tl.dot(tl.trans(k_tile), dst)
    dk = tl.dot(dst, q_tile, dk)
    _add(sums, part, tile, DESCRIPTORS)
    return dk, dv


@triton.jit(do_not_specialize=["n_pairs", "n_heads_kv", "group", "n_q", "n_k", "before", "after"])
def attention_bwd_reduce(
    q,
    k,
    v,
    do,
    statistics,
    sums,
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
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TURNED: tl.constexpr,
):
    """dk and dv of one block of columns, over the rows of every query head that shares them, and their part of dq."""
    block, kv_pair = place(tl.program_id(0), tl.cdiv(n_k, BLOCK_N), n_pairs, HEADS)
    batch, kv_head = kv_pair // n_heads_kv, kv_pair % n_heads_kv
    column = block * BLOCK_N

    k_tile = load_tile(
        k, batch, kv_head, column, stride_kb, stride_kh, stride_ks, n_k, BLOCK_N, D, WIDTH, True, DESCRIPTORS
    )
    v_tile = load_tile(
        v, batch, kv_head, column, stride_vb, stride_vh, stride_vs, n_k, BLOCK_N, D, WIDTH, True, DESCRIPTORS
    )
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
    ragged = tl.where(column + BLOCK_N > n_k, clear, ragged)  # columns past the end need masks in every row
    n_masked = clear - first + end - ragged
    factor = scale * LOG2E
    # Programs of one head that start in different rows do not wait for each other's sums.
    turn = column // BLOCK_M
    # What is the same in every step is not kept in registers: there are none to spare, and it costs little to make.
    for member in range(0, group):
        head = kv_head * group + member
        first_tile = (batch * (n_heads_kv * group) + head) * n_blocks
        for index in tl.range(0, n_masked, disable_licm=True):
            at = tl.where(index < clear - first, first + index, ragged + index - (clear - first))
            dk, dv = _step(
                dk, dv, k_tile, v_tile, q, do, statistics, sums,
                batch, head, first_tile, at, column,
                stride_qb, stride_qh, stride_qs, stride_db, stride_dh, stride_ds, n_q, n_k, factor, before, after,
                True, CAUSAL, BANDED, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip
        for index in tl.range(clear, ragged, disable_licm=True):
            at = index
            if TURNED:
                at = clear + (index + turn) % (ragged - clear)
            dk, dv = _step(
                dk, dv, k_tile, v_tile, q, do, statistics, sums,
                batch, head, first_tile, at, column,
                stride_qb, stride_qh, stride_qs, stride_db, stride_dh, stride_ds, n_q, n_k, factor, before, after,
                False, CAUSAL, BANDED, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip

    store_tile(dk_out, dk * scale, batch, kv_head, column, stride_dkb, stride_dkh, stride_dks, n_k, BLOCK_N, D, WIDTH)
    store_tile(dv_out, dv, batch, kv_head, column, stride_dvb, stride_dvh, stride_dvs, n_k, BLOCK_N, D, WIDTH)


@triton.jit
def attention_bwd_finish(
    sums,
    dq,
    stride_dqb,
    stride_dqh,
    stride_dqs,
    n_heads,
    n_q,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of rows of dq, of its finished sums."""
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    tile = tl.program_id(0)
    pair = tile // n_blocks
    row = tile % n_blocks * BLOCK_M
    inside = tl.arange(0, D)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    total = tl.load(sums + tile.to(tl.int64) * (BLOCK_M * D) + inside)
    batch, head = pair // n_heads, pair % n_heads
    dq_tile = tl.trans(total) * scale
    store_tile(dq, dq_tile, batch, head, row, stride_dqb, stride_dqh, stride_dqs, n_q, BLOCK_M, D, WIDTH)
