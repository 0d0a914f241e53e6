"""What kernels of linear attention have in common."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_FP16_ROOM = tl.constexpr(256.0)


class Rows(NamedTuple):
    """A tensor (B, H, S, ·) with its steps; the last axis is contiguous."""

    source: Any
    b: Any
    h: Any
    s: Any


@triton.jit
def load(
    x, batch, head, token, n, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Tokens `token` … of x, [CHUNK, BLOCK], or where TURNED [BLOCK, CHUNK]; zeros where there are none."""
    base = x.source + batch.to(tl.int64) * x.b + head.to(tl.int64) * x.h + token.to(tl.int64) * x.s
    r, c = tl.arange(0, CHUNK), column + tl.arange(0, BLOCK)
    if TURNED:
        at, inside = base + (c[:, None] + r[None, :] * x.s), r[None, :] < n - token
        if WIDTH % BLOCK != 0:
            inside = inside & (c[:, None] < WIDTH)
    else:
        at, inside = base + (r[:, None] * x.s + c[None, :]), r[:, None] < n - token
        if WIDTH % BLOCK != 0:
            inside = inside & (c[None, :] < WIDTH)
    found = tl.load(at, mask=inside, other=0.0)
    return found


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
def preceding(x):
    """Along the first axis each number's forerunner, of the first 0: a sum less its last number is its rounding."""
    at = tl.arange(0, x.shape[0])
    if len(x.shape) == 2:
        at = at[:, None]
    return tl.where(at > 0, tl.gather(x, tl.broadcast_to(tl.maximum(at - 1, 0), x.shape), 0), 0.0)


@triton.jit
def factored(state, like):
    """A state as a factor of a product, and what the product is to be multiplied by: sums may pass the end of fp16."""
    scale = 1.0
    if like.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(state), 1), 0)
        scale = tl.where(top > _FP16_ROOM, top / _FP16_ROOM, 1.0)
        state = state / scale
    return state.to(like.dtype), scale


@triton.jit
def mapped(x, tile, TURNED: tl.constexpr):
    """φ in fp32 of rows [·, WIDE], where TURNED [WIDE, ·], of all maps but Performer's. Columns that are none are 0."""
    x = x.to(tl.float32)
    axis: tl.constexpr = 0 if TURNED else 1
    d = tl.arange(0, tile.WIDE)
    there = d[:, None] < tile.D if TURNED else d[None, :] < tile.D
    if tile.MAP == "elu+1":
        x = tl.where(x > 0, x + 1, tl.exp2(x * _LOG2E))
        if tile.D != tile.WIDE:
            x = tl.where(there, x, 0.0)
    elif tile.MAP == "relu":
        x = tl.where(x < 0, 0.0, x)  # a maximum would lose NaN
    elif tile.MAP == "softmax":
        if tile.D != tile.WIDE:
            x = tl.where(there, x, -float("inf"))
        top = tl.max(x, axis)
        x = tl.exp(x - (top[None, :] if TURNED else top[:, None]))
        total = tl.sum(x, axis)
        x = x / (total[None, :] if TURNED else total[:, None])
    return x


@triton.jit
def pulled_back(features, gradient, tile, TURNED: tl.constexpr):
    """The gradient of rows in fp32, of that of their features φ, of which alone each map's derivative is made."""
    axis: tl.constexpr = 0 if TURNED else 1
    features = features.to(tl.float32)
    if tile.MAP == "elu+1":
        gradient *= tl.where(features > 1, 1.0, features)
    elif tile.MAP == "relu":
        gradient = tl.where(features <= 0, 0.0, gradient)
    elif tile.MAP == "softmax":
        common = tl.sum(features * gradient, axis)
        gradient = features * (gradient - (common[None, :] if TURNED else common[:, None]))
    return gradient
