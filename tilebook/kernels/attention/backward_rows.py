"""Triton kernel of the backward pass by blocks of rows: dq, dbias, and the delta that the other kernel reads."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.scores import columns_seen, looked_up, scored, survives, within
from tilebook.kernels.attention.tiles import LOG2E, load_tile, offset, place, rounded, store_tile


@triton.jit
def _store_dbias(dbias, ds, pair, row, column, n_q, n_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes a tile of dbias, (B, H, Sq, Sk) without gaps."""
    base = dbias + (pair.to(tl.int64) * n_q + row) * n_k + column
    rows, columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    there = (rows < n_q - row) & (columns < n_k - column)
    tl.store(base + rows * n_k + columns, ds.to(dbias.dtype.element_ty), mask=there)


@triton.jit
def _no_dbias(dbias, pair, first, last, row, n_q, n_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros for the columns `first` … `last` of dbias that no row of the block sees, in whole blocks."""
    for column in tl.range(first, last, BLOCK_N):
        nothing = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        _store_dbias(dbias, nothing, pair, row, column, n_q, n_k, BLOCK_M, BLOCK_N)


@triton.jit
def row_loop(
    dq,
    short,
    q_tile,
    do_tile,
    row_lse,
    row_delta,
    k,
    v,
    dbias,
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
    TF32: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Adds columns `first` … `last`, in whole blocks, to dq (without the scale), and writes their part of dbias.

    `scale` and `row_lse` are in powers of two, or with `SCORED` in natural units. Unless delta is `EXACT`, their ds
    goes to `short`, [BLOCK_M], instead.
    """
    before, after, mask, _bias, base, stride_bm, stride_bn, _slope, softcap, seed, dropout = extras
    # What LLVM takes out of the loop, descriptors of shared memory above all, it keeps in registers: wide tiles spill.
    for column in tl.range(first, last, BLOCK_N, disable_licm=D >= 128):
        column = tl.multiple_of(column, BLOCK_N)
        k_tile = load_tile(
            k, batch, kv_head, column, stride_kb, stride_kh, stride_ks, n_k, BLOCK_N, D, WIDTH, MASKED, DESCRIPTORS
        )
        v_tile = load_tile(
            v, batch, kv_head, column, stride_vb, stride_vh, stride_vs, n_k, BLOCK_N, D, WIDTH, MASKED, DESCRIPTORS
        )
        k_tile, v_tile = rounded(k_tile, TF32), rounded(v_tile, TF32)
        s = tl.dot(q_tile, tl.trans(k_tile), allow_tf32=TF32)
        dp = tl.dot(do_tile, tl.trans(v_tile), allow_tf32=TF32)
        if SCORED:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            s, bent = scored(s, row, column, at_rows, at_columns, n_q, n_k, scale, extras)
            p = tl.exp2((s - row_lse[:, None]) * LOG2E)
        else:
            p = tl.exp2(s * scale - row_lse[:, None])
        if MASKED:
            # Past the end exp2(0 - lse) may be infinite, and infinity times the zeros of k is not 0.
            columns = column + tl.arange(0, BLOCK_N)
            keep = columns[None, :] < n_k
            if CAUSAL:
                keep &= (row + tl.arange(0, BLOCK_M))[:, None] >= columns[None, :]
            if BANDED:
                keep &= within((row + tl.arange(0, BLOCK_M))[:, None], columns[None, :], before, after)
            p = tl.where(keep, p, 0.0)
        if mask is not None:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where(
                looked_up(mask + base, row, column, at_rows, at_columns, stride_bm, stride_bn, n_q, n_k), p, 0.0
            )
        if seed is not None:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            dp = tl.where(survives(at_rows, at_columns, pair, seed, dropout), dp / (1.0 - dropout), 0.0)
        ds = p * (dp - row_delta[:, None])
        if not EXACT:
            short += tl.sum(ds, 1)
        if dbias is not None:
            _store_dbias(dbias, ds, pair, row, column, n_q, n_k, BLOCK_M, BLOCK_N)
        if softcap is not None:
            ds = ds * (1.0 - bent * bent)
        if EXACT:
            dq = tl.dot(rounded(ds.to(k_tile.dtype), TF32), k_tile, dq, allow_tf32=TF32)
    return dq, short


@triton.jit(do_not_specialize=["n_pairs", "n_heads", "group", "n_q", "n_k", "before", "after"])
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
    dbias,
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
    """dq of one block of rows; also delta, which needs nothing that is not already here and saves a launch."""
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    block, pair = place(tl.program_id(0), n_blocks, n_pairs, HEADS)
    if CAUSAL or (after is not None and before is None):
        block = n_blocks - 1 - block  # the last rows see the most columns: start with them
    batch, head = pair // n_heads, pair % n_heads
    kv_head = head // group
    row = block * BLOCK_M

    do_tile = load_tile(
        do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS
    )
    o_tile = load_tile(o, batch, head, row, stride_ob, stride_oh, stride_os, n_q, BLOCK_M, D, WIDTH, True, False)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    at = pair.to(tl.int64) * n_q + rows
    if seed is None:
        tl.store(delta + at, row_delta, mask=rows < n_q)
    row_lse = tl.load(lse + at, mask=rows < n_q, other=float("inf"))
    if GAPS:
        row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)  # a row that saw nothing: p is 0 again
    if not SCORED:
        row_lse = row_lse * LOG2E
    q_tile = load_tile(q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS)
    q_tile, do_tile = rounded(q_tile, TF32), rounded(do_tile, TF32)

    last = n_k
    whole = n_k // BLOCK_N * BLOCK_N
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
    # Without dropout one pass. With it o was divided before it was rounded: a row of one weight alone then has an error
    # in delta that ds does not forgive. A row's ds add up to 0, so a first pass finds what delta is short of.
    for exact in tl.static_range(1 if seed is None else 0, 2):
        dq = tl.zeros([BLOCK_M, D], dtype=tl.float32)
        short = tl.zeros([BLOCK_M], dtype=tl.float32)
        grad = dbias if exact else None
        if before is not None:
            dq, short = row_loop(
                dq, short, q_tile, do_tile, row_lse, row_delta, k, v, grad, batch, kv_head, pair, first, clear, row,
                stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
                True, CAUSAL, BANDED, SCORED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, exact,
            )  # fmt: skip
        dq, short = row_loop(
            dq, short, q_tile, do_tile, row_lse, row_delta, k, v, grad, batch, kv_head, pair,
            clear if BANDED else 0, whole, row,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
            False, CAUSAL, BANDED, SCORED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, exact,
        )  # fmt: skip
        dq, short = row_loop(
            dq, short, q_tile, do_tile, row_lse, row_delta, k, v, grad, batch, kv_head, pair, whole, last, row,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
            True, CAUSAL, BANDED, SCORED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, exact,
        )  # fmt: skip
        if not exact:
            row_delta += short
    if seed is not None:
        tl.store(delta + at, row_delta, mask=rows < n_q)
    if dbias is not None:
        if BANDED:
            _no_dbias(dbias, pair, 0, first, row, n_q, n_k, BLOCK_M, BLOCK_N)
        _no_dbias(dbias, pair, tl.cdiv(last, BLOCK_N) * BLOCK_N, n_k, row, n_q, n_k, BLOCK_M, BLOCK_N)
    store_tile(dq_out, dq * scale, batch, head, row, stride_dqb, stride_dqh, stride_dqs, n_q, BLOCK_M, D, WIDTH)
