"""Optional parts of attention inside the kernels: limits, masks, soft-cap, ALiBi, bias, dropout.

What a call lacks is None, and Triton compiles it away: a plain call's kernels are as if there were none of this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.triton.args import VECTOR
from tilebook.kernels.attention.triton.tiles import LOG2E, offset

# The fewest rounds of Philox that pass the usual tests of randomness (Salmon et al. 2011); FlashAttention's number too.
PHILOX_ROUNDS = tl.constexpr(7)

# Columns of a mask that a program looks at together.
CHUNK = tl.constexpr(1024)


@triton.jit
def rows_seen(column, width, n_q, before, after):
    """[first, clear, whole, last): rows that see any of `width` columns; from `clear` to `whole` all of them."""
    first = 0
    clear = 0
    last = n_q
    whole = n_q
    if after is not None:
        first = tl.minimum(tl.maximum(column - after, 0), n_q)
        clear = tl.maximum(column + width - 1 - after, 0)
    if before is not None:
        last = tl.maximum(tl.minimum(column + width + before, n_q), first)
        whole = tl.maximum(tl.minimum(column + before + 1, n_q), 0)
    return first, clear, whole, last


@triton.jit
def columns_seen(row, height, n_k, before, after):
    """[first, clear, whole, last): columns that any of `height` rows sees; from `clear` to `whole` all do."""
    first = 0
    clear = 0
    last = n_k
    whole = n_k
    if before is not None:
        first = tl.minimum(tl.maximum(row - before, 0), n_k)
        clear = tl.maximum(row + height - 1 - before, 0)
    if after is not None:
        last = tl.maximum(tl.minimum(row + height + after, n_k), first)
        whole = tl.maximum(tl.minimum(row + after + 1, n_k), 0)
    return first, clear, whole, last


@triton.jit
def columns_of_band(row, n_k, before, after, tile):
    """`columns_seen` by the rows of a block, in whole blocks of columns but for `last`."""
    first, clear, whole, last = columns_seen(row, tile.BLOCK_M, n_k, before, after)
    if before is not None:
        first = first // tile.BLOCK_N * tile.BLOCK_N
        clear = tl.minimum(tl.cdiv(clear, tile.BLOCK_N) * tile.BLOCK_N, tl.cdiv(last, tile.BLOCK_N) * tile.BLOCK_N)
    else:
        clear = 0  # the constant, without which tiles would not be loaded ahead
    whole = tl.maximum(whole // tile.BLOCK_N * tile.BLOCK_N, clear)
    return first, clear, whole, last


@triton.jit
def keys_seen(marks, n_k):
    """The first column that takes part, the one behind the last, and how many do, of a mask that all rows have."""
    first = tl.full([CHUNK], 0x7FFFFFFF, dtype=tl.int32)
    last = tl.zeros([CHUNK], dtype=tl.int32)
    count = tl.zeros([CHUNK], dtype=tl.int32)
    for start in tl.range(0, n_k, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        part = tl.load(marks.mask + marks.base + columns.to(tl.int64) * marks.n, mask=columns < n_k, other=0) != 0
        first = tl.minimum(first, tl.where(part, columns, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(part, columns + 1, 0))
        count += part.to(tl.int32)
    return tl.min(first, 0), tl.max(last, 0), tl.sum(count, 0)


@triton.jit
def columns_of_keys(first, clear, whole, last, n_k, marks, tile):
    """What is left of [first, clear, whole, last) where all rows have one mask. Between the ends of what it shows
    blocks need it only if it has gaps there; without any, those of its ends."""
    start, end, count = keys_seen(marks, n_k)
    last = tl.minimum(last, end)
    first = tl.maximum(first, tl.minimum(start, n_k) // tile.BLOCK_N * tile.BLOCK_N)
    past = tl.maximum(tl.cdiv(last, tile.BLOCK_N) * tile.BLOCK_N, first)
    clear = tl.minimum(tl.maximum(clear, tl.cdiv(tl.minimum(start, n_k), tile.BLOCK_N) * tile.BLOCK_N), past)
    whole = tl.maximum(tl.minimum(whole, end // tile.BLOCK_N * tile.BLOCK_N), clear)
    if count < end - start:
        clear = first
        whole = first
    return first, clear, whole, last


@triton.jit
def blocks_visited(column, n_q, before, after, rules, tile):
    """`rows_seen` by the columns of a block, in blocks of rows: [first, clear, ragged, end)."""
    end = tl.cdiv(n_q, tile.BLOCK_M)
    first = 0
    clear = 0
    if rules.CAUSAL:
        first = tl.minimum(column // tile.BLOCK_M, end)
        clear = tl.minimum(tl.cdiv(column + tile.BLOCK_N - 1, tile.BLOCK_M), end)
    ragged = tl.maximum(n_q // tile.BLOCK_M, clear)
    if rules.BANDED:
        first, clear, ragged, end = rows_seen(column, tile.BLOCK_N, n_q, before, after)
        first, end = first // tile.BLOCK_M, tl.cdiv(end, tile.BLOCK_M)
        clear = tl.maximum(tl.minimum(tl.cdiv(clear, tile.BLOCK_M), end), first)
        ragged = tl.maximum(tl.minimum(ragged // tile.BLOCK_M, end), clear)
    return first, clear, ragged, end


@triton.jit
def numbered(row, column, tile):
    """The numbers of a tile's rows, [BLOCK_M, 1], and of its columns, [1, BLOCK_N]."""
    return (row + tl.arange(0, tile.BLOCK_M))[:, None], (column + tl.arange(0, tile.BLOCK_N))[None, :]


@triton.jit
def within(rows, columns, before, after):
    """Which (row, column) pairs lie in the band; `rows` and `columns` broadcast against each other."""
    if before is None:
        keep = columns <= rows + after
    elif after is None:
        keep = columns >= rows - before
    else:
        keep = (columns >= rows - before) & (columns <= rows + after)
    return keep


@triton.jit
def base_of(batch, head, scores):
    """Of a head's bias or mask, in elements."""
    return batch.to(tl.int64) * scores.b if scores.h is None else offset(batch, head, scores.b, scores.h)


@triton.jit
def keys_here(column, columns, scores, tile):
    """Which columns of a block take part, of a mask that all rows and heads have."""
    at = column + tl.arange(0, tile.BLOCK_N)
    mask = scores.mask + base_of(columns.batch, columns.head, scores) + at.to(tl.int64) * scores.n
    return tl.load(mask, mask=at < columns.n, other=0) != 0


@triton.jit
def looked_up(table, row, column, rows, columns, n_q, n_k, marks):
    """A tile of a bias or mask, 0 past the ends; `rows` and `columns` start at `row` and `column`.

    Of one that is the same for all rows it is one row, which is loaded once. Of rows that are whole vectors a vector is
    inside as a whole, or the compiler would load number by number.
    """
    base, step, edge = marks.base, marks.m, columns
    if marks.vectors is not None:
        base, step, edge = tl.multiple_of(base, VECTOR), tl.multiple_of(step, VECTOR), columns // VECTOR * VECTOR
    at = table + base + column.to(tl.int64) * marks.n + (columns - column) * marks.n
    inside = edge < n_k
    if step is not None:
        at += row.to(tl.int64) * step + (rows - row) * step
        inside &= rows < n_q
    return tl.load(at, mask=inside, other=0)


@triton.jit
def scored(s, row, column, rows, columns, n_q, n_k, scale, marks):
    """The scores in natural units after soft-cap, ALiBi and bias, and tanh(s / softcap) for their derivative."""
    s = s * scale
    bent = s
    if marks.softcap is not None:
        # exp2 may be infinite or 0: then this is exactly ±1.
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2E / marks.softcap)))
        s = bent * marks.softcap
    if marks.slope is not None:
        s -= marks.slope * tl.abs(rows + (n_k - n_q) - columns).to(tl.float32)
    if marks.bias is not None:
        s += looked_up(marks.bias, row, column, rows, columns, n_q, n_k, marks).to(tl.float32)
    return s, bent


@triton.jit
def shown(row, column, n_k, marks, rules, tile):
    """Which pairs of a tile there are and the form lets take part, but for a mask that is a tensor."""
    columns = column + tl.arange(0, tile.BLOCK_N)
    keep = columns[None, :] < n_k
    if rules.CAUSAL:
        keep &= (row + tl.arange(0, tile.BLOCK_M))[:, None] >= columns[None, :]
    if rules.BANDED:
        keep &= within((row + tl.arange(0, tile.BLOCK_M))[:, None], columns[None, :], marks.before, marks.after)
    return keep


@triton.jit
def survives(rows, columns, pair, seed, dropout):
    """Which weights dropout keeps: by (batch · head, row, column) alone, so that tiles do not matter."""
    bits, _, _, _ = tl.philox(seed, columns, rows, pair, 0, PHILOX_ROUNDS)
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout  # 24 bits, times 2⁻²⁴
