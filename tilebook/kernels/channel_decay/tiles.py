"""What the kernels of decays by channel have in common: their constants, products of decays, and states in memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tilebook.kernels.delta_rule.tiles import read
from tilebook.kernels.linear_attention.pytorch import LEAST

_LEAST = tl.constexpr(LEAST)


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
def decays(g, batch, head, token, n, column, tile):
    """What channels keep at each token; 1 where there is none."""
    found = read(g, batch, head, token, n, column, tile.CHUNK, tile.D, tile.SLICE)
    return tl.exp(tl.maximum(found.to(tl.float32), _LEAST))


@triton.jit
def halved(so_far, behind, level, tile):
    """Is a token in the later half of its 2 · 2^level tokens, and what lies between it and the middle of them; then
    what `so_far` and `behind` are of twice as many tokens.

    so_far, behind: what is kept from the beginning of a token's 2^level tokens to it, and behind it to their end.
    They are products of decays, not exponents: no number is above 1, and no difference of large sums has to be right.
    """
    t, half = tl.arange(0, tile.CHUNK), 1 << level
    late = ((t & half) != 0)[:, None]
    part = tl.where(late, so_far, behind)
    end = (t & -(2 * half)) + tl.where((t & half) != 0, half, 2 * half) - 1
    other = tl.gather(so_far, tl.broadcast_to(end[:, None], [tile.CHUNK, tile.SLICE]), 0)
    more = part * other
    return late, part, tl.where(late, more, so_far), tl.where(late, behind, more)


@triton.jit
def in_halves(level, tile):
    """[i, j]: are tokens i and j in different halves of 2 · 2^level tokens?"""
    t, half = tl.arange(0, tile.CHUNK), 1 << level
    return ((t ^ half)[:, None] ^ t[None, :]) < half


@triton.jit
def of_last(so_far, tile):
    """What is kept over a whole chunk."""
    t = tl.arange(0, tile.CHUNK)
    return tl.sum(tl.where((t == tile.CHUNK - 1)[:, None], so_far, 0.0), 0)


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
