"""The Triton kernel of rotary position embedding. A program takes HEADS heads, of q or of k, of ROWS tokens."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """A tensor x (B, H, S, D) and what becomes of it, y, with the steps over the first three axes of each."""

    x: Any
    y: Any
    n: Any
    x_b: Any
    x_h: Any
    x_s: Any
    y_b: Any
    y_h: Any
    y_s: Any


class Angles(NamedTuple):
    """cos and sin (B or 1, S, R), with their steps over the first two axes, of which the first is 0 where it is 1."""

    cos: Any
    sin: Any
    cos_b: Any
    cos_s: Any
    sin_b: Any
    sin_s: Any


@triton.jit
def _pairs(pointer, there, ROTATED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second number of each pair, in fp32. `there`: which heads of which tokens, (ROWS, HEADS, 1)."""
    ROWS: tl.constexpr = there.shape[0]
    HEADS: tl.constexpr = there.shape[1]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, None, :]
        at = tl.broadcast_to(pointer + both, (ROWS, HEADS, 2 * HALF))
        loaded = tl.load(at, mask=there & (both < ROTATED), other=0.0).to(tl.float32)
        first, second = loaded.reshape(ROWS, HEADS, HALF, 2).split()
    else:
        i = tl.arange(0, HALF)[None, None, :]
        at, inside = tl.broadcast_to(pointer + i, (ROWS, HEADS, HALF)), there & (i < ROTATED // 2)
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + ROTATED // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotate(
    of, angles, b, s, h, seq, ROTATED: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    x = of.x + b * of.x_b + s * of.x_s + h * of.x_h
    y = of.y + b * of.y_b + s * of.y_s + h * of.y_h
    there = (s < seq) & (h < of.n)
    # Once a head, from the L1 cache: once a token would be another layout of threads, and a way through shared memory.
    c1, c2 = _pairs(angles.cos + b * angles.cos_b + s * angles.cos_s, there, ROTATED, HALF, INTERLEAVED)
    s1, s2 = _pairs(angles.sin + b * angles.sin_b + s * angles.sin_s, there, ROTATED, HALF, INTERLEAVED)
    x1, x2 = _pairs(x, there, ROTATED, HALF, INTERLEAVED)
    if BACKWARD:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, None, :]
        joined = tl.join(y1, y2).reshape(there.shape[0], there.shape[1], 2 * HALF)
        tl.store(y + both, joined.to(of.y.dtype.element_ty), mask=there & (both < ROTATED))
    else:
        i = tl.arange(0, HALF)[None, None, :]
        inside = there & (i < ROTATED // 2)
        tl.store(y + i, y1.to(of.y.dtype.element_ty), mask=inside)
        tl.store(y + ROTATED // 2 + i, y2.to(of.y.dtype.element_ty), mask=inside)
    if REST:
        more = ROTATED + tl.arange(0, REST)[None, None, :]
        passed = there & (more < WIDTH)
        tl.store(y + more, tl.load(x + more, mask=passed), mask=passed)


@triton.jit(do_not_specialize=["seq"])
def rope_kernel(
    q, k, angles, seq, ROTATED: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """y = x cos + turned(x) sin, turned((a, b)) = (−b, a) for each pair; BACKWARD: what that makes of gradients.

    Programs with the same tokens follow each other.
    """
    of_q, of_k = tl.cdiv(q.n, HEADS), tl.cdiv(k.n, HEADS)
    part, place = tl.program_id(0) % (of_q + of_k), tl.program_id(0) // (of_q + of_k)
    pieces = tl.cdiv(seq, ROWS)
    b = (place // pieces).to(tl.int64)
    s = (place % pieces * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    if part < of_q:
        h = (part * HEADS + tl.arange(0, HEADS))[None, :, None]
        _rotate(q, angles, b, s, h, seq, ROTATED, WIDTH, INTERLEAVED, BACKWARD, HALF, REST)
    else:
        h = ((part - of_q) * HEADS + tl.arange(0, HEADS))[None, :, None]
        _rotate(k, angles, b, s, h, seq, ROTATED, WIDTH, INTERLEAVED, BACKWARD, HALF, REST)
