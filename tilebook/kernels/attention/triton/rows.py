"""The backward pass by blocks of rows: dq, dbias, and the delta that the kernel by columns reads."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.triton.args import POINTERS, UNSPECIALIZED, Marks, Matrix
from tilebook.kernels.attention.triton.scores import (
    base_of,
    columns_of_band,
    columns_of_keys,
    looked_up,
    numbered,
    scored,
    shown,
    survives,
)
from tilebook.kernels.attention.triton.tiles import LOG2E, load_tile, rounded, store_tile
from tilebook.kernels.attention.triton.where import my_rows


@triton.jit
def _store_dbias(dbias, ds, rows, row, column, n_k, tile):
    """Writes a tile of dbias, (B, H, Sq, Sk) without gaps."""
    base = dbias + (rows.pair.to(tl.int64) * rows.n + row) * n_k + column
    down, along = tl.arange(0, tile.BLOCK_M)[:, None], tl.arange(0, tile.BLOCK_N)[None, :]
    there = (down < rows.n - row) & (along < n_k - column)
    tl.store(base + down * n_k + along, ds.to(dbias.dtype.element_ty), mask=there)


@triton.jit
def _no_dbias(dbias, first, last, rows, row, n_k, tile):
    """Zeros for the columns `first` … `last` of dbias that no row of the block sees, in whole blocks."""
    for column in tl.range(first, last, tile.BLOCK_N):
        nothing = tl.zeros([tile.BLOCK_M, tile.BLOCK_N], dtype=tl.float32)
        _store_dbias(dbias, nothing, rows, row, column, n_k, tile)


@triton.jit
def row_loop(
    dq, short, q, do, lse, delta, k, v, dbias, rows, seen, row, first, last, scale, marks,
    MASKED: tl.constexpr, EXACT: tl.constexpr, rules, tile,
):  # fmt: skip
    """Adds columns `first` … `last`, in whole blocks, to dq (without the scale), and writes their part of dbias.

    `scale` and `lse` are in powers of two, or with `SCORED` in natural units. Unless delta is `EXACT`, their ds goes to
    `short`, [BLOCK_M], instead.
    """
    # What LLVM takes out of the loop, descriptors of shared memory above all, it keeps in registers: wide tiles spill.
    for column in tl.range(first, last, tile.BLOCK_N, disable_licm=tile.D >= 128):
        column = tl.multiple_of(column, tile.BLOCK_N)
        k_tile = load_tile(k, seen, column, tile.BLOCK_N, tile, MASKED, tile.DESCRIPTORS)
        v_tile = load_tile(v, seen, column, tile.BLOCK_N, tile, MASKED, tile.DESCRIPTORS)
        k_tile, v_tile = rounded(k_tile, rules.TF32), rounded(v_tile, rules.TF32)
        s = tl.dot(q, tl.trans(k_tile), allow_tf32=rules.TF32)
        dp = tl.dot(do, tl.trans(v_tile), allow_tf32=rules.TF32)
        at_rows, at_columns = (
            (row + tl.arange(0, tile.BLOCK_M))[:, None],
            (column + tl.arange(0, tile.BLOCK_N))[None, :],
        )
        if rules.SCORED:
            at_rows, at_columns = numbered(row, column, tile)
            s, bent = scored(s, row, column, at_rows, at_columns, rows.n, seen.n, scale, marks)
            p = tl.exp2((s - lse[:, None]) * LOG2E)
        else:
            p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            # Past the end exp2(0 - lse) may be infinite, and infinity times the zeros of k is not 0.
            p = tl.where(shown(row, column, seen.n, marks, rules, tile), p, 0.0)
        if marks.mask is not None and (MASKED or marks.m is not None):
            at_rows, at_columns = numbered(row, column, tile)
            p = tl.where(looked_up(marks.mask, row, column, at_rows, at_columns, rows.n, seen.n, marks), p, 0.0)
        if marks.seed is not None:
            at_rows, at_columns = numbered(row, column, tile)
            alive = survives(at_rows, at_columns, rows.pair, marks.seed, marks.dropout)
            dp = tl.where(alive, dp / (1.0 - marks.dropout), 0.0)
        ds = p * (dp - delta[:, None])
        if not EXACT:
            short += tl.sum(ds, 1)
        if dbias is not None:
            _store_dbias(dbias, ds, rows, row, column, seen.n, tile)
        if marks.softcap is not None:
            ds = ds * (1.0 - bent * bent)
        if EXACT:
            dq = tl.dot(rounded(ds.to(k_tile.dtype), rules.TF32), k_tile, dq, allow_tf32=rules.TF32)
    return dq, short


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dq(
    q, k, v, do, o, stats, dq_out, steps, packs, n_outer, n_heads, group, n_q, n_k, scale, before, after, scores,
    rules, tile,
):  # fmt: skip
    """dq of one block of rows; also delta, which needs nothing that is not already here and saves a launch."""
    LAST_FIRST: tl.constexpr = rules.CAUSAL or (after is not None and before is None)
    row, rows, seen = my_rows(packs, n_outer, n_heads, group, n_q, n_k, LAST_FIRST, tile)
    if packs is not None:
        if row >= rows.n:
            return
        if rules.BOTTOM_RIGHT:  # padded limits come counted from the top left
            before = None if before is None else before - (seen.n - rows.n)
            after = None if after is None else after + (seen.n - rows.n)
    q_steps, k_steps, v_steps, do_steps, o_steps, dq_steps = steps
    k, v = Matrix(k, k_steps.b, k_steps.h, k_steps.s), Matrix(v, v_steps.b, v_steps.h, v_steps.s)

    do_tile = load_tile(
        Matrix(do, do_steps.b, do_steps.h, do_steps.s), rows, row, tile.BLOCK_M, tile, True, tile.DESCRIPTORS
    )
    o_tile = load_tile(Matrix(o, o_steps.b, o_steps.h, o_steps.s), rows, row, tile.BLOCK_M, tile, True, POINTERS)
    delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    here = row + tl.arange(0, tile.BLOCK_M)
    first = rows.pair.to(tl.int64) * n_q if packs is None else rows.head.to(tl.int64) * n_q + rows.batch
    at = first + here
    if scores.seed is None:
        tl.store(stats.delta + at, delta, mask=here < rows.n)
    lse = tl.load(stats.lse + at, mask=here < rows.n, other=float("inf"))
    if rules.GAPS or packs is not None:
        lse = tl.where(lse == -float("inf"), float("inf"), lse)  # a row that saw nothing: p is 0 again
    if not rules.SCORED:
        lse = lse * LOG2E
    q_tile = load_tile(
        Matrix(q, q_steps.b, q_steps.h, q_steps.s), rows, row, tile.BLOCK_M, tile, True, tile.DESCRIPTORS
    )
    q_tile, do_tile = rounded(q_tile, rules.TF32), rounded(do_tile, rules.TF32)

    first, clear = 0, 0
    last = seen.n
    whole = seen.n // tile.BLOCK_N * tile.BLOCK_N  # columns before this one need no mask
    if rules.CAUSAL:
        last = tl.minimum(row + tile.BLOCK_M, seen.n)
        whole = tl.minimum(row + 1, seen.n) // tile.BLOCK_N * tile.BLOCK_N
    if rules.BANDED:
        first, clear, whole, last = columns_of_band(row, seen.n, before, after, tile)
    factor = scale if rules.SCORED else scale * LOG2E
    seed = None if scores.seed is None else tl.load(scores.seed)
    base = None if scores.b is None else base_of(rows.batch, rows.head, scores)
    slope = (
        None
        if scores.slopes is None
        else tl.load(scores.slopes + rows.batch * scores.slope_b + rows.head * scores.slope_h)
    )
    marks = Marks(
        before, after, scores.mask, scores.bias, base, scores.m, scores.n, scores.vectors, slope, scores.softcap, seed,
        scores.dropout,
    )  # fmt: skip
    KEYS: tl.constexpr = scores.mask is not None and scores.m is None
    if KEYS:
        first, clear, whole, last = columns_of_keys(first, clear, whole, last, seen.n, marks, tile)
    # Without dropout one pass. With it o was divided before it was rounded: a row of one weight alone then has an error
    # in delta that ds does not forgive. A row's ds add up to 0, so a first pass finds what delta is short of.
    for exact in tl.static_range(1 if scores.seed is None else 0, 2):
        dq = tl.zeros([tile.BLOCK_M, tile.D], dtype=tl.float32)
        short = tl.zeros([tile.BLOCK_M], dtype=tl.float32)
        dbias = scores.dbias if exact else None
        if before is not None or KEYS:
            dq, short = row_loop(
                dq, short, q_tile, do_tile, lse, delta, k, v, dbias, rows, seen, row, first, clear, factor, marks,
                True, exact, rules, tile,
            )  # fmt: skip
        dq, short = row_loop(
            dq, short, q_tile, do_tile, lse, delta, k, v, dbias, rows, seen, row, clear, whole, factor, marks,
            False, exact, rules, tile,
        )  # fmt: skip
        dq, short = row_loop(
            dq, short, q_tile, do_tile, lse, delta, k, v, dbias, rows, seen, row, whole, last, factor, marks,
            True, exact, rules, tile,
        )  # fmt: skip
        if not exact:
            delta += short
    if scores.seed is not None:
        tl.store(stats.delta + at, delta, mask=here < rows.n)
    if scores.dbias is not None:
        if rules.BANDED:
            _no_dbias(scores.dbias, 0, first, rows, row, seen.n, tile)
        _no_dbias(scores.dbias, tl.cdiv(last, tile.BLOCK_N) * tile.BLOCK_N, seen.n, rows, row, seen.n, tile)
    out = Matrix(dq_out, dq_steps.b, dq_steps.h, dq_steps.s)
    store_tile(out, dq * scale, rows, row, tile.BLOCK_M, tile)
