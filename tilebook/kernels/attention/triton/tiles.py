"""How the kernels load, store and round tiles, and which block of which head a program works on."""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.triton.args import PACKED

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

PACKED_ROWS = tl.constexpr(1 << 30)
"""Rows after which a descriptor of packed sequences ends, and every sequence in it. See `load_tile`."""


@triton.jit
def place(program, n_blocks, n_pairs, HEADS: tl.constexpr):
    """(block, pair) of a program; `HEADS` heads at a time take turns, each with its blocks in order.

    One head at a time keeps its tensors in L2. Several spread the heavy blocks of a causal mask over the whole of a
    group, so that fewer programs are left waiting for the last heavy one.
    """
    group = program // (HEADS * n_blocks)
    first = group * HEADS
    some = tl.minimum(n_pairs - first, HEADS)
    within = program - first * n_blocks
    return within // some, first + within % some


@triton.jit
def offset(batch, head, stride_b, stride_h):
    """Of a head's first element; 64 bits wide, as tensors may hold more than 2³¹ elements."""
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_tile(x, where, row, ROWS: tl.constexpr, tile, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Rows `row` … `row + ROWS` of those at `where`, [ROWS, D]; `MASKED` where some may lie past the last: they are 0.

    So are columns past the head dimension. Where tiles come by descriptors, the hardware sees to what is out of range.

    A packed descriptor's rows end at 2³⁰, and so are a sequence's made to, so that zeros follow them instead of the
    next sequence. An axis whose steps wrap around 64 bits takes off the rows that are too many, as in Triton's
    `ragged_tma`.
    """
    if DESCRIPTORS == PACKED:
        short = PACKED_ROWS - where.n
        place = [short + where.n, where.batch + where.n, where.head, short + row, 0]
        loaded = x.source.load(place).reshape(ROWS, tile.D)
    elif DESCRIPTORS:
        loaded = x.source.load([where.batch, where.head, row, 0]).reshape(ROWS, tile.D)
    else:
        # The row goes into the 64-bit base, so that addresses inside a tile need 32 bits.
        base = x.source + offset(where.batch, where.head, x.b, x.h) + row.to(tl.int64) * x.s
        rows = tl.arange(0, ROWS)
        inside = rows[:, None] * x.s + tl.arange(0, tile.D)[None, :]
        if MASKED and tile.D == tile.WIDTH:
            loaded = tl.load(base + inside, mask=rows[:, None] < where.n - row, other=0.0)
        elif MASKED:
            there = (rows[:, None] < where.n - row) & (tl.arange(0, tile.D) < tile.WIDTH)[None, :]
            loaded = tl.load(base + inside, mask=there, other=0.0)
        elif tile.D != tile.WIDTH:
            loaded = tl.load(base + inside, mask=(tl.arange(0, tile.D) < tile.WIDTH)[None, :], other=0.0)
        else:
            loaded = tl.load(base + inside)
    return loaded


@triton.jit
def store_tile(out, values, where, row, ROWS: tl.constexpr, tile):
    """Writes those rows of a [ROWS, D] tile that there are at `where`, rounded to the dtype of `out`."""
    base = out.source + offset(where.batch, where.head, out.b, out.h) + row.to(tl.int64) * out.s
    rows = tl.arange(0, ROWS)
    inside = rows[:, None] * out.s + tl.arange(0, tile.D)[None, :]
    there = rows[:, None] < where.n - row
    if tile.D != tile.WIDTH:
        there &= (tl.arange(0, tile.D) < tile.WIDTH)[None, :]
    tl.store(base + inside, values.to(out.source.dtype.element_ty), mask=there)


@triton.jit
def rounded(values, TF32: tl.constexpr):
    """A factor of a product. Tensor cores cut off what tf32 has no room for: rounded to the nearest first, fp32 makes a
    quarter of that error, and none that adds up. NaN stays NaN."""
    if TF32 and values.dtype == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
        near = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        values = tl.where(values == values, near, values)
    return values
