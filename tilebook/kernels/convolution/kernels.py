"""The Triton kernels of a convolution's weight gradient: a product over all positions, of images laid by channels.

dW[o, c, i, j] = Σ over images and positions (r, s) of dy[o, r, s] · x[c, r · stride + i, s · stride + j], x with its
padding around it. Channels that lie side by side make the reads of a tap long, and a padding that is in memory spares
each of them the question whether it is inside.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

SIDE = tl.constexpr(64)
"""Channels and positions that a program lays out."""


@triton.jit
def lay_kernel(
    x, out, C, H: tl.constexpr, W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
):  # fmt: skip
    """(B, C, H, W) → (B, H + 2 PAD_H, W + 2 PAD_W, C), zeros around."""
    wide: tl.constexpr = W + 2 * PAD_W
    places: tl.constexpr = (H + 2 * PAD_H) * wide
    blocks, across = tl.cdiv(places, SIDE), tl.cdiv(C, SIDE)
    image = (tl.program_id(0) // (blocks * across)).to(tl.int64)
    place = tl.program_id(0) // across % blocks * SIDE + tl.arange(0, SIDE)
    channel = tl.program_id(0) % across * SIDE + tl.arange(0, SIDE)
    row, column = place // wide - PAD_H, place % wide - PAD_W
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    there = (channel < C)[:, None]
    from_ = x + image * C * H * W + channel[:, None].to(tl.int64) * (H * W) + (row * W + column)[None, :]
    values = tl.load(from_, mask=there & inside[None, :], other=0.0)
    to = out + image * places * C + place[:, None].to(tl.int64) * C + channel[None, :]
    tl.store(to, values.T, mask=(place < places)[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=["positions", "rows"])
def weight_kernel(
    dy, x, parts, positions, rows, channels, outputs,
    MADE: tl.constexpr, LAID: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, TAPS: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_O: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """parts (splits, O, taps · C) = dyᵀ · x over `rows` positions each; dy (positions, O), x (B, *LAID, C).

    MADE, LAID, KERNEL, STRIDE: heights and widths.
    """
    MADE_H: tl.constexpr = MADE[0]
    MADE_W: tl.constexpr = MADE[1]
    HIGH: tl.constexpr = LAID[0]
    WIDE: tl.constexpr = LAID[1]
    KERNEL_W: tl.constexpr = KERNEL[1]
    taps: tl.constexpr = KERNEL[0] * KERNEL_W
    across, deep = tl.cdiv(outputs, BLOCK_O), tl.cdiv(channels, BLOCK_C)
    tiles = across * deep * tl.cdiv(taps, TAPS)
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o = tile % across * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.arange(0, TAPS * BLOCK_C)
    tap = tile // (across * deep) * TAPS + n // BLOCK_C
    c = tile // across % deep * BLOCK_C + n % BLOCK_C
    known = tl.minimum(tap, taps - 1)  # the taps of the last group may be fewer
    shift = (known // KERNEL_W * WIDE + known % KERNEL_W) * channels + c
    first = split * rows
    acc = tl.zeros((BLOCK_O, TAPS * BLOCK_C), tl.float32)
    for k0 in range(first, tl.minimum(first + rows, positions), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        image, place = k // (MADE_H * MADE_W), k % (MADE_H * MADE_W)
        base = ((image * HIGH + place // MADE_W * STRIDE[0]) * WIDE + place % MADE_W * STRIDE[1]) * channels
        left_mask = (k < positions)[:, None]
        right_mask = left_mask
        if not EVEN_O:
            left_mask = left_mask & (o < outputs)[None, :]
        if not EVEN_C:
            right_mask = right_mask & (c < channels)[None, :]
        left = tl.load(dy + k[:, None] * outputs + o[None, :], mask=left_mask, other=0.0)
        right = tl.load(x + base[:, None] + shift[None, :], mask=right_mask, other=0.0)
        acc = tl.dot(left.T, right, acc)
    inside = (o < outputs)[:, None] & ((tap < taps) & (c < channels))[None, :]
    to = parts + (split.to(tl.int64) * outputs + o[:, None]) * (taps * channels) + (tap * channels + c)[None, :]
    tl.store(to, acc, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def join_kernel(parts, dw, splits, outputs, channels, taps, BLOCK: tl.constexpr):
    """dw (O, C, taps) = Σ parts (splits, O, taps · C)."""
    width = taps * channels
    blocks = tl.cdiv(width, BLOCK)
    o = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(parts + (split * outputs + o) * width + n, mask=inside, other=0.0)
    tl.store(dw + o * width + n % channels * taps + n // channels, acc.to(dw.dtype.element_ty), mask=inside)
