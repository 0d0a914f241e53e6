"""What kernels of linear attention have in common."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

_FP16_ROOM = tl.constexpr(256.0)


class Rows(NamedTuple):
    """A tensor (B, H, S, ·) with its steps; the last axis is contiguous."""

    source: Any
    b: Any
    h: Any
    s: Any


@triton.jit
def put(x, values, batch, head, token, n, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    base = x.source + batch.to(tl.int64) * x.b + head.to(tl.int64) * x.h + token.to(tl.int64) * x.s
    r, c = tl.arange(0, CHUNK), column + tl.arange(0, BLOCK)
    inside = (r[:, None] < n - token) & (c[None, :] < WIDTH)
    tl.store(base + (r[:, None] * x.s + c[None, :]), values.to(x.source.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, tile):
    """a · b in fp32; fp32 factors are not rounded."""
    precision: tl.constexpr = "ieee" if tile.EXACT else "tf32"
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def factored(state, like):
    """A state as a factor of a product, and what the product is to be multiplied by: sums may pass the end of fp16."""
    scale = 1.0
    if like.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(state), 1), 0)
        scale = tl.where(top > _FP16_ROOM, top / _FP16_ROOM, 1.0)
        state = state / scale
    return state.to(like.dtype), scale
