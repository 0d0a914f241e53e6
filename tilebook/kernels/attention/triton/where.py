"""Which rows and columns a program works on: padded, where every head has as many, or packed one after the other.

The host does not know the lengths of packed sequences. Sequence b gets the blocks from `cu_seqlens[b] // BLOCK + b` on,
which leaves it as many as it needs or one more, whatever the lengths: programs without work are at most one a sequence,
where a grid over (longest sequence, batch) has them in proportion to how much longer than the mean the longest is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.triton.args import Where
from tilebook.kernels.attention.triton.tiles import place

# Sequences that a program looks at together.
CHUNK = tl.constexpr(128)


@triton.jit
def stretch(cu_seqlens, sequence, n_sequences, total, rest):
    """(first row, rows) of a sequence. The one after the last ends at row `rest`, or is empty if that is before it.

    What lies outside of 0 … total is held to it, so that no numbers whatever lead outside of the tensors.
    """
    start = tl.load(cu_seqlens + sequence, mask=sequence > 0, other=0)
    start = tl.minimum(tl.maximum(start, 0), total)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < n_sequences, other=rest)
    return start, tl.minimum(tl.maximum(end, start), total) - start


@triton.jit
def located(block, cu_seqlens, n_sequences, total, BLOCK: tl.constexpr):
    """(sequence, first row, rows, row of the block in it) of the `block`-th of all blocks.

    Rows behind the last sequence are one more sequence. The row may lie past the end: such a block has no work.
    """
    count = tl.zeros([CHUNK], dtype=tl.int32)
    for first in range(0, n_sequences + 1, CHUNK):
        at = first + tl.arange(0, CHUNK)
        start = tl.load(cu_seqlens + at, mask=(at > 0) & (at <= n_sequences), other=0)
        start = tl.minimum(tl.maximum(start, 0), total)
        count += ((start // BLOCK + at <= block) & (at <= n_sequences)).to(tl.int32)
    sequence = tl.sum(count, 0) - 1
    start, rows = stretch(cu_seqlens, sequence, n_sequences, total, total)
    return sequence, start, rows, (block - start // BLOCK - sequence) * BLOCK


@triton.jit
def my_rows(packs, n_outer, n_heads, group, n_q, n_k, LAST_FIRST: tl.constexpr, tile):
    """The row that a program's block begins with, and `Where` its rows and the columns that they see are.

    n_outer: batches times heads, or packed sequences, of `n_q` rows and `n_k` columns each, or altogether. Blocks past
    the end of a sequence begin with a row that it has not got: they have no work. LAST_FIRST: the last rows see the
    most columns; start with them.
    """
    if packs is None:
        n_blocks = tl.cdiv(n_q, tile.BLOCK_M)
        block, pair = place(tl.program_id(0), n_blocks, n_outer, tile.HEADS)
        if LAST_FIRST:
            block = n_blocks - 1 - block
        batch, head = pair // n_heads, pair % n_heads
        rows = Where(batch, head, n_q, pair)
        columns = Where(batch, head // group, n_k, pair)
        row = block * tile.BLOCK_M
    else:
        n_blocks = n_q // tile.BLOCK_M + n_outer + 1
        block, head = place(tl.program_id(0), n_blocks, n_heads, tile.HEADS)
        if LAST_FIRST:
            block = n_blocks - 1 - block
        sequence, start, length, row = located(block, packs.cu_q, n_outer, n_q, tile.BLOCK_M)
        start_k, length_k = stretch(packs.cu_k, sequence, n_outer, n_k, 0)
        rows = Where(start, head, length, head)
        columns = Where(start_k, head // group, length_k, head)
    return row, rows, columns


@triton.jit
def my_columns(packs, n_outer, n_heads, n_q, n_k, tile):
    """The column that a program's block begins with, and `Where` its columns and the rows that see them are.

    n_heads: of k and v; the rows are of the first of the query heads that share them. See `my_rows`.
    """
    if packs is None:
        block, pair = place(tl.program_id(0), tl.cdiv(n_k, tile.BLOCK_N), n_outer, tile.HEADS)
        batch, head = pair // n_heads, pair % n_heads
        columns = Where(batch, head, n_k, pair)
        rows = Where(batch, head, n_q, pair)
        column = block * tile.BLOCK_N
    else:
        n_blocks = n_k // tile.BLOCK_N + n_outer + 1
        block, head = place(tl.program_id(0), n_blocks, n_heads, tile.HEADS)
        sequence, start_k, length_k, column = located(block, packs.cu_k, n_outer, n_k, tile.BLOCK_N)
        start, length = stretch(packs.cu_q, sequence, n_outer, n_q, 0)
        columns = Where(start_k, head, length_k, head)
        rows = Where(start, head, length, head)
    return column, columns, rows
