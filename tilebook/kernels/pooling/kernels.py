"""The Triton kernel of max pooling's gradient: each number of the input looks at the windows that it lies in.

Nothing is added up in memory: every number is written once, sums have one order, and no zeros are laid before.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    dy, indices, dx,
    INNER: tl.constexpr, H: tl.constexpr, W: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx (planes, H, W, INNER) = Σ dy (planes, HIGH, WIDE, INNER) of the windows whose largest number was here."""
    size: tl.constexpr = H * W * INNER
    tiles: tl.constexpr = (size + BLOCK - 1) // BLOCK
    over_h: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H
    over_w: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    inner, pixel = place % INNER, place // INNER
    last_r, last_c = (pixel // W + PAD_H) // STRIDE_H, (pixel % W + PAD_W) // STRIDE_W
    dy += plane * (HIGH * WIDE * INNER)
    indices += plane * (HIGH * WIDE * INNER)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(over_h):
        r = last_r - (over_h - 1 - i)
        for j in tl.static_range(over_w):
            c = last_c - (over_w - 1 - j)
            there = inside & (r >= 0) & (r < HIGH) & (c >= 0) & (c < WIDE)
            at = (r * WIDE + c) * INNER + inner
            chosen = tl.load(indices + at, mask=there, other=-1)
            total += tl.load(dy + at, mask=there & (chosen == pixel), other=0.0).to(tl.float32)
    tl.store(dx + plane * size + place, total.to(dx.dtype.element_ty), mask=inside)
