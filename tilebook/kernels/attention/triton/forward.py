"""o = softmax(scale · q kᵀ) v and each row's log-sum-exp, in one pass over k and v (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.triton.args import MADE, UNSPECIALIZED, Marks, Matrix
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
from tilebook.kernels.attention.triton.tiles import LN2, LOG2E, load_tile, rounded, store_tile
from tilebook.kernels.attention.triton.where import my_rows


@triton.jit
def highest(s, tile):
    """The maximum of each row. A thread's columns of a row are every eighth and its neighbour: maxima of those first
    are two short chains of instructions for a long one. Wide heads have no registers left for it."""
    if tile.WIDTH <= 64:
        s = tl.max(tl.reshape(s, [tile.BLOCK_M, tile.BLOCK_N // 8, 8]), 1)
    return tl.max(s, 1)


@triton.jit
def attend(acc, l_i, m_i, q, k, v, rows, seen, row, first, last, scale, marks, MASKED: tl.constexpr, rules, tile):
    """Columns `first` … `last`, in whole blocks: the running Σ p v, l_i = Σ p and m_i, the maximum, of each row.

    `scale` brings scores to powers of two, and maxima are in them; where something is done to the scores themselves
    (`SCORED`) both are in natural units, and differences are taken first: biases may be huge. Up to 64 wide, Σ p is in
    eight parts a row, which meet when all is added up.
    """
    for column in tl.range(first, last, tile.BLOCK_N):
        column = tl.multiple_of(column, tile.BLOCK_N)
        k_tile = load_tile(k, seen, column, tile.BLOCK_N, tile, MASKED, tile.DESCRIPTORS)
        s = tl.dot(q, tl.trans(rounded(k_tile, rules.TF32)), allow_tf32=rules.TF32)
        at_rows, at_columns = (
            (row + tl.arange(0, tile.BLOCK_M))[:, None],
            (column + tl.arange(0, tile.BLOCK_N))[None, :],
        )
        if rules.SCORED:
            at_rows, at_columns = numbered(row, column, tile)
            s, _bent = scored(s, row, column, at_rows, at_columns, rows.n, seen.n, scale, marks)
        if MASKED:
            s = tl.where(shown(row, column, seen.n, marks, rules, tile), s, -float("inf"))
        if marks.mask is not None and (MASKED or marks.m is not None):
            at_rows, at_columns = numbered(row, column, tile)
            part = looked_up(marks.mask, row, column, at_rows, at_columns, rows.n, seen.n, marks)
            s = tl.where(part, s, -float("inf"))
        if rules.SCORED:
            higher = tl.maximum(m_i, highest(s, tile))
            ground = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2((s - ground[:, None]) * LOG2E)
            decay = tl.exp2((m_i - ground) * LOG2E)
        else:
            # Column 0 is visited first and no mask hides it, so the maximum is finite from then on; unless there are
            # gaps, and then the maximum of nothing must not meet itself: ∞ - ∞ is not 0.
            higher = tl.maximum(m_i, highest(s, tile) * scale)
            ground = higher
            if rules.GAPS:
                ground = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(s * scale - ground[:, None])
            decay = tl.exp2(m_i - ground)
        if tile.WIDTH <= 64:  # noqa: SIM108
            total = tl.sum(tl.reshape(p, [tile.BLOCK_M, tile.BLOCK_N // 8, 8]), 1)
        else:
            total = tl.sum(p, 1)
        if marks.seed is not None:
            at_rows, at_columns = numbered(row, column, tile)
            p = tl.where(survives(at_rows, at_columns, rows.pair, marks.seed, marks.dropout), p, 0.0)
        acc = acc * decay[:, None]
        v_tile = load_tile(v, seen, column, tile.BLOCK_N, tile, MASKED, tile.DESCRIPTORS)
        acc = tl.dot(rounded(p.to(v_tile.dtype), rules.TF32), rounded(v_tile, rules.TF32), acc, allow_tf32=rules.TF32)
        l_i = l_i * (decay[:, None] if tile.WIDTH <= 64 else decay) + total
        m_i = higher
    return acc, l_i, m_i


@triton.jit
def described(x, steps, n_batch, n_heads, n_rows, ROWS: tl.constexpr, tile):
    """A tensor descriptor that each program makes for itself, of tiles of `ROWS` rows."""
    return tl.make_tensor_descriptor(
        x, [n_batch, n_heads, n_rows, tile.WIDTH], [steps.b, steps.h, steps.s, 1], [1, 1, ROWS, tile.D]
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd(
    q, k, v, o, lse, steps, packs, n_outer, n_heads, group, n_q, n_k, scale, before, after, scores, rules, tile
):
    """o and lse of one block of rows, of `n_outer` pairs of batch and head; with `packs` of as many packed sequences,
    and then n_q and n_k are all their rows and columns."""
    LAST_FIRST: tl.constexpr = rules.CAUSAL or (after is not None and before is None)
    row, rows, seen = my_rows(packs, n_outer, n_heads, group, n_q, n_k, LAST_FIRST, tile)
    if packs is not None:
        if row >= rows.n:
            return
        if rules.BOTTOM_RIGHT:  # padded limits come counted from the top left
            before = None if before is None else before - (seen.n - rows.n)
            after = None if after is None else after + (seen.n - rows.n)
    q_steps, k_steps, v_steps, o_steps = steps
    if tile.DESCRIPTORS == MADE:
        n_batch, n_kv = n_outer // n_heads, n_heads // group
        k = described(k, k_steps, n_batch, n_kv, n_k, tile.BLOCK_N, tile)
        v = described(v, v_steps, n_batch, n_kv, n_k, tile.BLOCK_N, tile)
        q = described(q, q_steps, n_batch, n_heads, n_q, tile.BLOCK_M, tile)
    k, v = Matrix(k, k_steps.b, k_steps.h, k_steps.s), Matrix(v, v_steps.b, v_steps.h, v_steps.s)

    q_tile = load_tile(
        Matrix(q, q_steps.b, q_steps.h, q_steps.s), rows, row, tile.BLOCK_M, tile, True, tile.DESCRIPTORS
    )
    q_tile = rounded(q_tile, rules.TF32)
    acc = tl.zeros([tile.BLOCK_M, tile.D], dtype=tl.float32)
    l_i = tl.zeros([tile.BLOCK_M, 8] if tile.WIDTH <= 64 else [tile.BLOCK_M], dtype=tl.float32)
    m_i = tl.full([tile.BLOCK_M], -float("inf"), dtype=tl.float32)

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
    if before is not None or KEYS:
        acc, l_i, m_i = attend(
            acc, l_i, m_i, q_tile, k, v, rows, seen, row, first, clear, factor, marks, True, rules, tile
        )
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q_tile, k, v, rows, seen, row, clear, whole, factor, marks, False, rules, tile
    )
    acc, l_i, m_i = attend(acc, l_i, m_i, q_tile, k, v, rows, seen, row, whole, last, factor, marks, True, rules, tile)

    if tile.WIDTH <= 64:
        l_i = tl.sum(l_i, 1)
    share = l_i
    if rules.GAPS or packs is not None:  # a packed sequence may have no columns at all
        share = tl.where(l_i == 0.0, 1.0, l_i)  # a row that sees nothing is 0, and its log-sum-exp -inf
    if scores.dropout is not None:
        share = share * (1.0 - scores.dropout)
    store_tile(Matrix(o, o_steps.b, o_steps.h, o_steps.s), acc / share[:, None], rows, row, tile.BLOCK_M, tile)
    here = row + tl.arange(0, tile.BLOCK_M)
    first = rows.pair.to(tl.int64) * n_q if packs is None else rows.head.to(tl.int64) * n_q + rows.batch
    at = lse + first + here
    total = m_i + tl.log2(l_i) * LN2 if rules.SCORED else (m_i + tl.log2(l_i)) * LN2
    tl.store(at, total, mask=here < rows.n)
