"""The Triton kernel of max pooling's gradient: cells of the input look at the windows that reach into them.

A cell is as large as a stride, so that the cells of a program ask for windows that lie side by side, each once. Nothing
is added up in memory: every number is written once, sums have one order, and no zeros are laid before.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    dy, indices, dx,
    INNER: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr,
    OVER_H: tl.constexpr, OVER_W: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (planes, H, W, INNER) = Σ dy (planes, HIGH, WIDE, INNER) of the windows whose largest number was here.

    OVER: windows that reach into a cell, of which the first is FIRST further than it.
    PAIRS: columns of a cell are two, of which none is beyond the edge, and are written together.
    """
    across: tl.constexpr = (W + STRIDE_W - 1) // STRIDE_W
    cells: tl.constexpr = (H + STRIDE_H - 1) // STRIDE_H * across * INNER
    tiles: tl.constexpr = (cells + BLOCK - 1) // BLOCK
    plane, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK
    cell = start + tl.arange(0, BLOCK)
    inside = cell < cells
    inner, row, column = cell % INNER, cell // (across * INNER), cell // INNER % across
    dy += plane * (HIGH * WIDE * INNER)
    indices += plane * (HIGH * WIDE * INNER)
    dx += plane * (H * W * INNER)
    own = row * (STRIDE_H * W) + column * STRIDE_W
    chosen, passed = (), ()
    for r in tl.static_range(OVER_H):
        for c in tl.static_range(OVER_W):
            y, x = row + (FIRST_H + r), column + (FIRST_W + c)
            there = inside & (y >= 0) & (y < HIGH) & (x >= 0) & (x < WIDE)
            at = (y * WIDE + x) * INNER + inner
            chosen += (tl.load(indices + at, mask=there, other=-1),)
            passed += (tl.load(dy + at, mask=there, other=0.0).to(tl.float32),)
    for i in tl.static_range(STRIDE_H):
        left = tl.zeros((BLOCK,), tl.float32)
        for j in tl.static_range(STRIDE_W):
            total = tl.zeros((BLOCK,), tl.float32)
            for window in tl.static_range(OVER_H * OVER_W):
                total += tl.where(chosen[window] == own + (i * W + j), passed[window], 0.0)
            if not PAIRS:
                to = (own + (i * W + j)) * INNER + inner
                here = inside & (row * STRIDE_H + i < H) & (column * STRIDE_W + j < W)
                tl.store(dx + to, total.to(dx.dtype.element_ty), mask=here)
            elif j == 0:
                left = total
            else:
                n = start * 2 + tl.arange(0, 2 * BLOCK)
                to = n // W * (STRIDE_H * W) + n % W + i * W
                here = (n < 2 * cells) & (n // W * STRIDE_H + i < H)
                tl.store(dx + to, tl.interleave(left, total).to(dx.dtype.element_ty), mask=here)
