"""What the kernels of decays by channel have in common: their constants, sums of log-decays, and states in memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tilebook.kernels.delta_rule.tiles import read
from tilebook.kernels.linear_attention.pytorch import LEAST

_LEAST = tl.constexpr(LEAST)
_LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Constants. D, V: the widths; WIDE: the power of two above D; SLICE, BLOCK_V: columns of k and of v at once.

    LEVELS: how often a chunk can be halved.
    """

    CHUNK: Any
    LEVELS: Any
    D: Any
    V: Any
    WIDE: Any
    SLICE: Any
    BLOCK_V: Any
    EXACT: Any


@triton.jit
def summed(g, batch, head, token, n, column, tile, AFTER: tl.constexpr):
    """Sums of a chunk's log-decays to base 2 up to each token, or of those AFTER it; by channel."""
    each = read(g, batch, head, token + AFTER, n, column, tile.CHUNK, tile.D, tile.SLICE)
    each = tl.maximum(each.to(tl.float32), _LEAST) * _LOG2E
    if AFTER:
        each = tl.where((tl.arange(0, tile.CHUNK) + 1 < tile.CHUNK)[:, None], each, 0.0)
    return tl.cumsum(each, 0, reverse=AFTER == 1)


@triton.jit
def sums_at(sums, pair, row, column, n, tile):
    """Those sums of some tokens of a head, as they were written; behind the last its own again."""
    d = column + tl.arange(0, tile.SLICE)
    base = sums + (pair.to(tl.int64) * n) * tile.D
    at = base + (tl.minimum(row, n - 1).to(tl.int64) * tile.D)[:, None] + d[None, :]
    return tl.load(at) if tile.D % tile.SLICE == 0 else tl.load(at, mask=(d < tile.D)[None, :], other=0.0)


@triton.jit
def decays(sums, rests, pair, token, column, n, tile):
    """Sums of a chunk's log-decays up to each token, behind each, and of all."""
    r, d = tl.arange(0, tile.CHUNK), column + tl.arange(0, tile.SLICE)
    c = sums_at(sums, pair, token + r, column, n, tile)
    end = tl.minimum(token + tile.CHUNK, n) - 1
    last = tl.load(sums + (pair.to(tl.int64) * n + end) * tile.D + d, mask=d < tile.D, other=0.0)
    rest = last[None, :] - c if rests is None else sums_at(rests, pair, token + r, column, n, tile)
    return c, rest, last


@triton.jit
def halved(c, sums, pair, token, column, level, n, tile):
    """Is a token in the later half of its 2 · 2^level tokens, and what is kept between it and the middle of them.

    What two tokens in different halves keep multiplies to what is kept between them; no exponent is above 0.
    """
    t, half = tl.arange(0, tile.CHUNK), 1 << level
    middle = sums_at(sums, pair, token + (t & -(2 * half)) + half - 1, column, n, tile)
    return ((t & half) != 0)[:, None], tl.exp2(-tl.abs(c - middle))


@triton.jit
def in_halves(level, tile):
    """[i, j]: are tokens i and j in different halves of 2 · 2^level tokens?"""
    t, half = tl.arange(0, tile.CHUNK), 1 << level
    return ((t ^ half)[:, None] ^ t[None, :]) < half


@triton.jit
def kept_of(kept, place, tile):
    """What channels keep of a state, [WIDE]; `place`: which chunk or walk of all heads'."""
    d = tl.arange(0, tile.WIDE)
    return tl.load(kept + place.to(tl.int64) * tile.D + d, mask=d < tile.D, other=0.0)


@triton.jit
def state_slice(states, pair, chunk, chunks, first, column, tile):
    """Some channels of a chunk's state, transposed: [BLOCK_V, SLICE]."""
    d, v = first + tl.arange(0, tile.SLICE), column + tl.arange(0, tile.BLOCK_V)
    base = states + (pair.to(tl.int64) * chunks + chunk) * (tile.V * tile.D)
    inside = (v < tile.V)[:, None] & (d < tile.D)[None, :]
    return tl.load(base + (v[:, None] * tile.D + d[None, :]), mask=inside, other=0.0)
