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
def _each(g, batch, head, token, n, column, tile):
    """Log-decays of tokens `token` …, to base 2."""
    found = read(g, batch, head, token, n, column, tile.CHUNK, tile.D, tile.SLICE)
    return tl.maximum(found.to(tl.float32), _LEAST) * _LOG2E


@triton.jit
def decays(g, batch, head, token, n, column, tile):
    """Sums of a chunk's log-decays to base 2: up to each token, behind each, and of all; by channel.

    fp32 adds those behind up from the end: what is left of a difference of large sums is their rounding, which 16 bits
    do not see.
    """
    c = tl.cumsum(_each(g, batch, head, token, n, column, tile), 0)
    last = tl.min(c, 0)
    if tile.EXACT:
        r = tl.arange(0, tile.CHUNK)
        after = tl.where((r + 1 < tile.CHUNK)[:, None], _each(g, batch, head, token + 1, n, column, tile), 0.0)
        rest = tl.cumsum(after, 0, reverse=True)
    else:
        rest = last[None, :] - c
    return c, rest, last


@triton.jit
def halfway(c, SIZE: tl.constexpr, tile):
    """What of a token's decays lies between it and the middle of its 2 · SIZE tokens.

    So many the decays of two tokens in different halves multiply to; no exponent is above 0.
    """
    blocks: tl.constexpr = tile.CHUNK // (2 * SIZE)
    r = tl.arange(0, 2 * SIZE)
    c = tl.reshape(c, [blocks, 2 * SIZE, tile.SLICE])
    middle = tl.sum(tl.where((r == SIZE - 1)[None, :, None], c, 0.0), 1)
    return tl.reshape(tl.exp2(-tl.abs(c - middle[:, None, :])), [tile.CHUNK, tile.SLICE])


@triton.jit
def later_half(LEVEL: tl.constexpr, tile):
    """[i, j]: are tokens i and j of the two halves of 2 · 2^LEVEL tokens, j of the first?"""
    r = tl.arange(0, tile.CHUNK)
    return (((r[:, None] ^ r[None, :]) >> LEVEL) == 1) & (r[:, None] > r[None, :])


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
