"""Which block of which sequence a program works on, found from cu_seqlens on the GPU; and how launchers address packs.

The host does not know the lengths. Sequence b gets the blocks from `cu_seqlens[b] // BLOCK + b` on, which leaves it
as many as it needs or one more, whatever the lengths: programs without work are at most one a sequence, where a grid
over (longest sequence, batch) has them in proportion to how much longer than the mean the longest is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook.kernels.attention.tiles import PACKED_ROWS

_ANY = 0x7FFF0000  # no limit on an axis

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


def n_blocks(total: int, n_sequences: int, block: int) -> int:
    """Blocks of all sequences and of what lies behind them, at most."""
    return total // block + n_sequences + 1


def addressable(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only if the kernels cannot address it: rows contiguous, and a tile's rows within 2³¹ elements."""
    return x if x.stride(-1) == 1 and x.stride(0) < 1 << 23 else x.contiguous()


def describe(x: torch.Tensor, rows: int) -> Any:
    """A host-side descriptor for `load_tile`, whose blocks are `rows` rows of one head of one sequence.

    The steps of its first axis, taken PACKED_ROWS times, come to 2⁶⁴ elements less the rows that are too many.
    """
    end = PACKED_ROWS.value
    step, head, _ = x.stride()
    shape = [_ANY, _ANY, x.shape[1], end, x.shape[2]]
    strides = [(1 << 64) // end - step, step, head, step, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, 1, rows, triton.next_power_of_2(x.shape[2])])
