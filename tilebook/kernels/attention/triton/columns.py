"""The backward pass by blocks of columns: dk and dv."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.triton.args import UNSPECIALIZED, Marks, Matrix, Where
from tilebook.kernels.attention.triton.scores import (
    base_of,
    blocks_visited,
    keys_here,
    looked_up,
    scored,
    survives,
    within,
)
from tilebook.kernels.attention.triton.tiles import LOG2E, load_tile, rounded, store_tile
from tilebook.kernels.attention.triton.where import my_columns


@triton.jit
def column_step(
    dk, dv, k_tile, v_tile, q, do, stats, rows, seen, first, block, column, scale, marks,
    MASKED: tl.constexpr, rules, tile,
):  # fmt: skip
    """Adds one block of rows to dk (without the scale) and dv. Scores stand transposed, [BLOCK_N, BLOCK_M].

    `scale` brings scores to powers of two, or with `SCORED` to natural units, as in the forward pass.
    """
    row = tl.multiple_of(block * tile.BLOCK_M, tile.BLOCK_M)
    q_tile = load_tile(q, rows, row, tile.BLOCK_M, tile, MASKED, tile.DESCRIPTORS)
    q_tile = rounded(q_tile, rules.TF32)
    st = tl.dot(k_tile, tl.trans(q_tile), allow_tf32=rules.TF32)
    here = row + tl.arange(0, tile.BLOCK_M)
    at = first + here
    if MASKED:
        # An infinite log-sum-exp makes p exactly 0 for rows past the end.
        lse = tl.load(stats.lse + at, mask=here < rows.n, other=float("inf"))
        delta = tl.load(stats.delta + at, mask=here < rows.n, other=0.0)
    else:
        lse = tl.load(stats.lse + at)
        delta = tl.load(stats.delta + at)
    if rules.GAPS:
        lse = tl.where(lse == -float("inf"), float("inf"), lse)  # a row that saw nothing: p is 0 again
    at_rows, at_columns = here[None, :], (column + tl.arange(0, tile.BLOCK_N))[:, None]
    if rules.SCORED:
        st, bent = scored(st, row, column, at_rows, at_columns, rows.n, seen.n, scale, marks)
        pt = tl.exp2((st - lse[None, :]) * LOG2E)
    else:
        pt = tl.exp2(st * scale - (lse * LOG2E)[None, :])
    if MASKED and rules.CAUSAL:
        pt = tl.where(at_rows >= at_columns, pt, 0.0)
    elif MASKED and rules.BANDED:
        pt = tl.where(within(at_rows, at_columns, marks.before, marks.after), pt, 0.0)
    if marks.mask is not None:
        pt = tl.where(looked_up(marks.mask, row, column, at_rows, at_columns, rows.n, seen.n, marks), pt, 0.0)
    do_tile = load_tile(do, rows, row, tile.BLOCK_M, tile, MASKED, tile.DESCRIPTORS)
    do_tile = rounded(do_tile, rules.TF32)
    dpt = tl.dot(v_tile, tl.trans(do_tile), allow_tf32=rules.TF32)
    used = pt
    if marks.seed is not None:
        alive = survives(at_rows, at_columns, rows.pair, marks.seed, marks.dropout)
        used = tl.where(alive, pt, 0.0)
        dpt = tl.where(alive, dpt / (1.0 - marks.dropout), 0.0)
    dv = tl.dot(rounded(used.to(do_tile.dtype), rules.TF32), do_tile, dv, allow_tf32=rules.TF32)
    dst = pt * (dpt - delta[None, :])
    if marks.softcap is not None:
        dst = dst * (1.0 - bent * bent)
    dk = tl.dot(rounded(dst.to(q_tile.dtype), rules.TF32), q_tile, dk, allow_tf32=rules.TF32)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dkdv(
    q, k, v, do, stats, dk_out, dv_out, steps, packs, n_outer, n_heads, group, n_q, n_k, scale, before, after, scores,
    rules, tile,
):  # fmt: skip
    """dk and dv of one block of columns, over the rows of every query head that shares them; `n_heads` are those of k
    and v."""
    column, mine, seen = my_columns(packs, n_outer, n_heads, n_q, n_k, tile)
    if packs is not None:
        if column >= mine.n:
            return
        if rules.BOTTOM_RIGHT:  # padded limits come counted from the top left
            before = None if before is None else before - (mine.n - seen.n)
            after = None if after is None else after + (mine.n - seen.n)
    q_steps, k_steps, v_steps, do_steps, dk_steps, dv_steps = steps
    q, do = Matrix(q, q_steps.b, q_steps.h, q_steps.s), Matrix(do, do_steps.b, do_steps.h, do_steps.s)

    k_tile = load_tile(
        Matrix(k, k_steps.b, k_steps.h, k_steps.s), mine, column, tile.BLOCK_N, tile, True, tile.DESCRIPTORS
    )
    v_tile = load_tile(
        Matrix(v, v_steps.b, v_steps.h, v_steps.s), mine, column, tile.BLOCK_N, tile, True, tile.DESCRIPTORS
    )
    k_tile, v_tile = rounded(k_tile, rules.TF32), rounded(v_tile, rules.TF32)
    dk = tl.zeros([tile.BLOCK_N, tile.D], dtype=tl.float32)
    dv = tl.zeros([tile.BLOCK_N, tile.D], dtype=tl.float32)

    # Blocks of rows: those of the band's edges and the ragged last one need masks; those between them do not.
    first, clear, ragged, end = blocks_visited(column, seen.n, before, after, rules, tile)
    # A mask that all rows and heads have hides whole columns: they are computed, and then they are nothing.
    KEYS: tl.constexpr = scores.mask is not None and scores.m is None and scores.h is None
    if KEYS:
        part = keys_here(column, mine, scores, tile)
        if tl.max(part.to(tl.int32), 0) == 0:
            clear = first
            ragged = first
            end = first
    n_masked = clear - first + end - ragged
    factor = scale if rules.SCORED else scale * LOG2E
    seed = None if scores.seed is None else tl.load(scores.seed)
    for member in range(0, group):
        head = mine.head * group + member
        rows = Where(seen.batch, head, seen.n, seen.batch * (n_heads * group) + head)
        begin = rows.pair.to(tl.int64) * n_q if packs is None else rows.head.to(tl.int64) * n_q + rows.batch
        base = None if scores.b is None else base_of(rows.batch, head, scores)
        slope = (
            None
            if scores.slopes is None
            else tl.load(scores.slopes + rows.batch * scores.slope_b + head * scores.slope_h)
        )
        marks = Marks(
            before,
            after,
            None if KEYS else scores.mask,
            scores.bias,
            base,
            scores.m,
            scores.n,
            scores.vectors,
            slope,
            scores.softcap,
            seed,
            scores.dropout,
        )
        # What LLVM takes out of a loop, descriptors of shared memory above all, fills registers: wide tiles spill.
        for index in tl.range(0, n_masked, disable_licm=tile.D >= 128):
            at = tl.where(index < clear - first, first + index, ragged + index - (clear - first))
            dk, dv = column_step(
                dk, dv, k_tile, v_tile, q, do, stats, rows, mine, begin, at, column, factor, marks, True, rules, tile
            )
        for at in tl.range(clear, ragged, disable_licm=tile.D >= 128):
            dk, dv = column_step(
                dk, dv, k_tile, v_tile, q, do, stats, rows, mine, begin, at, column, factor, marks, False, rules, tile
            )

    if KEYS:
        dk, dv = tl.where(part[:, None], dk, 0.0), tl.where(part[:, None], dv, 0.0)
    if scores.dropout is not None:
        dv = dv / (1.0 - scores.dropout)
    dk_out, dv_out = (
        Matrix(dk_out, dk_steps.b, dk_steps.h, dk_steps.s),
        Matrix(dv_out, dv_steps.b, dv_steps.h, dv_steps.s),
    )
    store_tile(dk_out, dk * scale, mine, column, tile.BLOCK_N, tile)
    store_tile(dv_out, dv, mine, column, tile.BLOCK_N, tile)
