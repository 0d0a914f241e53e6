"""Triton kernels of the backward pass in one launch: programs by blocks of columns, then programs by blocks of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.backward_columns import attention_bwd_dkdv
from tilebook.kernels.attention.backward_rows import row_loop
from tilebook.kernels.attention.scores import columns_seen
from tilebook.kernels.attention.tiles import LOG2E, load_tile, offset, place, store_tile


@triton.jit(do_not_specialize=["n_heads", "n_q"])
def attention_bwd_delta(
    do,
    o,
    delta,
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
    """delta = Σ o do of one block of rows: both kinds of programs read it, and neither waits for the other."""
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    pair = tl.program_id(0) // n_blocks
    row = tl.program_id(0) % n_blocks * BLOCK_M
    batch, head = pair // n_heads, pair % n_heads
    do_tile = load_tile(do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, WIDTH, True, False)
    o_tile = load_tile(o, batch, head, row, stride_ob, stride_oh, stride_os, n_q, BLOCK_M, D, WIDTH, True, False)
    rows = row + tl.arange(0, BLOCK_M)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * n_q + rows, row_delta, mask=rows < n_q)


@triton.jit
def _described(
    x,
    n_batch,
    n_heads,
    n_rows,
    stride_b,
    stride_h,
    stride_s,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """What `load_tile` reads tiles of `ROWS` rows from: a tensor descriptor of `x` made here, or `x` itself."""
    source = x
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(
            x, [n_batch, n_heads, n_rows, WIDTH], [stride_b, stride_h, stride_s, 1], [1, 1, ROWS, D]
        )
    return source


@triton.jit
def _rows(
    program,
    q,
    k,
    v,
    do,
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
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    SCORED: tl.constexpr,
    GAPS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """dq of one block of rows."""
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    block, pair = place(program, n_blocks, n_pairs, HEADS)
    if CAUSAL or (after is not None and before is None):
        block = n_blocks - 1 - block  # the last rows see the most columns: start with them
    batch, head = pair // n_heads, pair % n_heads
    kv_head = head // group
    row = block * BLOCK_M

    q_tile = load_tile(q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS)
    do_tile = load_tile(
        do, batch, head, row, stride_db, stride_dh, stride_ds, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS
    )
    rows = row + tl.arange(0, BLOCK_M)
    at = pair.to(tl.int64) * n_q + rows
    row_delta = tl.load(delta + at, mask=rows < n_q, other=0.0)
    row_lse = tl.load(lse + at, mask=rows < n_q, other=float("inf"))
    if GAPS:
        row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)  # a row that saw nothing: p is 0 again
    if not SCORED:
        row_lse = row_lse * LOG2E

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
    extras = (
        before, after, mask, bias, None if stride_bb is None else offset(batch, head, stride_bb, stride_bh),
        stride_bm, stride_bn, None if slopes is None else tl.load(slopes + batch * stride_ab + head * stride_ah),
        softcap, None, None,
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    short = tl.zeros([BLOCK_M], dtype=tl.float32)
    if before is not None:
        dq, short = row_loop(
            dq, short, q_tile, do_tile, row_lse, row_delta, k, v, None, batch, kv_head, pair, first, clear, row,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
            True, CAUSAL, BANDED, SCORED, True, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, True,
        )  # fmt: skip
    dq, short = row_loop(
        dq, short, q_tile, do_tile, row_lse, row_delta, k, v, None, batch, kv_head, pair,
        clear if BANDED else 0, whole, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
        False, CAUSAL, BANDED, SCORED, True, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, True,
    )  # fmt: skip
    dq, short = row_loop(
        dq, short, q_tile, do_tile, row_lse, row_delta, k, v, None, batch, kv_head, pair, whole, last, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
        True, CAUSAL, BANDED, SCORED, True, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, True,
    )  # fmt: skip
    store_tile(dq_out, dq * scale, batch, head, row, stride_dqb, stride_dqh, stride_dqs, n_q, BLOCK_M, D, WIDTH)


@triton.jit(do_not_specialize=["n_pairs", "n_heads", "group", "n_q", "n_k", "before", "after"])
def attention_bwd_joint(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dq,
    dk,
    dv,
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
    stride_dqb,
    stride_dqh,
    stride_dqs,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
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
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    SCORED: tl.constexpr,
    GAPS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M1: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    BLOCK_M2: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """dk and dv of a block of columns in the first programs, dq of a block of rows in the rest.

    The first have the more work each, and what the last of them leave of the GPU the others fill. With `DESCRIPTORS`
    each program makes its own, so that the two kinds may have tiles of different heights.
    """
    program = tl.program_id(0)
    n_pairs_kv, n_heads_kv, n_batch = n_pairs // group, n_heads // group, n_pairs // n_heads
    n_columns = tl.cdiv(n_k, BLOCK_N1) * n_pairs_kv
    if program < n_columns:
        attention_bwd_dkdv(
            _described(q, n_batch, n_heads, n_q, stride_qb, stride_qh, stride_qs, BLOCK_M1, D, WIDTH, DESCRIPTORS),
            _described(k, n_batch, n_heads_kv, n_k, stride_kb, stride_kh, stride_ks, BLOCK_N1, D, WIDTH, DESCRIPTORS),
            _described(v, n_batch, n_heads_kv, n_k, stride_vb, stride_vh, stride_vs, BLOCK_N1, D, WIDTH, DESCRIPTORS),
            _described(do, n_batch, n_heads, n_q, stride_db, stride_dh, stride_ds, BLOCK_M1, D, WIDTH, DESCRIPTORS),
            lse, delta, dk, dv,
            stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
            stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds,
            stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
            n_pairs_kv, n_heads_kv, group, n_q, n_k, scale, before, after, mask, bias,
            stride_bb, stride_bh, stride_bm, stride_bn, slopes, stride_ab, stride_ah, softcap, None, None,
            CAUSAL, BANDED, SCORED, GAPS, True, D, WIDTH, BLOCK_M1, BLOCK_N1, HEADS, DESCRIPTORS,
        )  # fmt: skip
    else:
        _rows(
            program - n_columns,
            _described(q, n_batch, n_heads, n_q, stride_qb, stride_qh, stride_qs, BLOCK_M2, D, WIDTH, DESCRIPTORS),
            _described(k, n_batch, n_heads_kv, n_k, stride_kb, stride_kh, stride_ks, BLOCK_N2, D, WIDTH, DESCRIPTORS),
            _described(v, n_batch, n_heads_kv, n_k, stride_vb, stride_vh, stride_vs, BLOCK_N2, D, WIDTH, DESCRIPTORS),
            _described(do, n_batch, n_heads, n_q, stride_db, stride_dh, stride_ds, BLOCK_M2, D, WIDTH, DESCRIPTORS),
            lse, delta, dq,
            stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
            stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_ds, stride_dqb, stride_dqh, stride_dqs,
            n_pairs, n_heads, group, n_q, n_k, scale, before, after, mask, bias,
            stride_bb, stride_bh, stride_bm, stride_bn, slopes, stride_ab, stride_ah, softcap,
            CAUSAL, BANDED, SCORED, GAPS, D, WIDTH, BLOCK_M2, BLOCK_N2, HEADS, DESCRIPTORS,
        )  # fmt: skip
