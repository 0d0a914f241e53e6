"""What the kernels of the gated delta rule have in common: whose tiles a program has, and where they lie."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

_FP16_ROOM = tl.constexpr(256.0)


class Tile(NamedTuple):
    """Constants. D, V: the widths; WIDE: the power of two above D; SLICE, BLOCK_V: columns of k and of v at once.

    NORM: rows of q and k are divided by their lengths. MERGE: the precision of products that inverses are made of.
    """

    CHUNK: Any
    D: Any
    V: Any
    WIDE: Any
    SLICE: Any
    BLOCK_V: Any
    NORM: Any
    EXACT: Any
    MERGE: Any


class Given(NamedTuple):
    """A state of each head (B, H, D, V) that a walk begins with, or is to end with, with its steps; or None."""

    source: Any
    b: Any
    h: Any
    d: Any
    v: Any


@triton.jit
def factored(state, like):
    """A state as a factor of a product, and what the product is to be multiplied by: sums may pass the end of fp16."""
    scale = 1.0
    if like.dtype == tl.float16:
        top = tl.max(tl.abs(state))
        scale = tl.where(top > _FP16_ROOM, top / _FP16_ROOM, 1.0)
        state = state / scale
    return state.to(like.dtype), scale


@triton.jit
def whose(heads, tile):
    """(first column of v, head, batch) of a program, and which pair of batch and head that is."""
    tiles = tl.cdiv(tile.V, tile.BLOCK_V)
    program = tl.program_id(0)
    pair = program // tiles
    return program % tiles * tile.BLOCK_V, pair % heads, pair // heads, pair


@triton.jit
def read(x, batch, head, token, n, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens `token` … of x, columns `column` … `column + BLOCK` of them; zeros where there are none."""
    base = x.source + batch.to(tl.int64) * x.b + head.to(tl.int64) * x.h + token.to(tl.int64) * x.s
    r, c = tl.arange(0, CHUNK), column + tl.arange(0, BLOCK)
    at = base + (r[:, None] * x.s + c[None, :])
    if WIDTH % BLOCK == 0:
        found = tl.load(at, mask=r[:, None] < n - token, other=0.0)
    else:
        found = tl.load(at, mask=(r[:, None] < n - token) & (c[None, :] < WIDTH), other=0.0)
    return found


@triton.jit
def square(x, pair, chunk, chunks, tile):
    """Where a chunk's matrix [CHUNK, CHUNK] lies."""
    r = tl.arange(0, tile.CHUNK)
    base = x + (pair.to(tl.int64) * chunks + chunk) * (tile.CHUNK * tile.CHUNK)
    return base + (r[:, None] * tile.CHUNK + r[None, :])


@triton.jit
def line(lines, pair, which: tl.constexpr, n, tile):
    """Where numbers of a head's tokens begin: sums of log-decays up to each token of its chunk, those behind it, β,
    and what keys and queries are to be multiplied by, where that is not 1."""
    count: tl.constexpr = 5 if tile.NORM else 3
    return lines + (pair.to(tl.int64) * count + which) * n


@triton.jit
def numbers(lines, pair, token, n, scale, tile):
    """Of a chunk: sums of its log-decays up to each token, and of all; β; what tokens count for: keys in front of the
    state before, keys in the state behind, queries in front of the state before; and lengths of keys and queries."""
    r = tl.arange(0, tile.CHUNK)
    inside = r < n - token
    sums, first = line(lines, pair, 0, n, tile), token + r
    last = tl.load(sums + tl.minimum(token + tile.CHUNK, n) - 1)
    c = tl.where(inside, tl.load(sums + first, mask=inside, other=0.0), last)
    rest = tl.load(line(lines, pair, 1, n, tile) + first, mask=inside, other=0.0)
    rate = tl.load(line(lines, pair, 2, n, tile) + first, mask=inside, other=0.0)
    of_key, of_query = tl.full([tile.CHUNK], 1.0, tl.float32), tl.full([tile.CHUNK], 1.0, tl.float32)
    if tile.NORM:
        of_key = tl.load(line(lines, pair, 3, n, tile) + first, mask=inside, other=0.0)
        of_query = tl.load(line(lines, pair, 4, n, tile) + first, mask=inside, other=0.0)
    within = tl.exp(c)
    return c, last, rate, within * of_key, tl.exp(rest) * of_key, within * (of_query * scale), of_key, of_query


@triton.jit
def seen(c, tile):
    """exp(c_i − c_j) where j ≤ i, else 0."""
    r = tl.arange(0, tile.CHUNK)
    return tl.exp(tl.where(r[:, None] >= r[None, :], c[:, None] - c[None, :], -float("inf")))


@triton.jit
def begun(given, batch, head, column, tile):
    """The state [WIDE, BLOCK_V] that a walk begins with, in fp32; zeros where there is none."""
    d, v = tl.arange(0, tile.WIDE), column + tl.arange(0, tile.BLOCK_V)
    state = tl.zeros([tile.WIDE, tile.BLOCK_V], tl.float32)
    if given.source is not None:
        base = given.source + batch.to(tl.int64) * given.b + head.to(tl.int64) * given.h
        inside = (d < tile.D)[:, None] & (v < tile.V)[None, :]
        state += tl.load(base + d[:, None] * given.d + v[None, :] * given.v, mask=inside, other=0.0).to(tl.float32)
    return state


@triton.jit
def ended(given, state, batch, head, column, tile):
    """Writes the state that a walk ends with, where somebody wants it."""
    if given.source is not None:
        d, v = tl.arange(0, tile.WIDE), column + tl.arange(0, tile.BLOCK_V)
        base = given.source + batch.to(tl.int64) * given.b + head.to(tl.int64) * given.h
        inside = (d < tile.D)[:, None] & (v < tile.V)[None, :]
        tl.store(base + d[:, None] * given.d + v[None, :] * given.v, state, mask=inside)


@triton.jit
def _places(states, pair, chunk, chunks, column, tile):
    d, v = tl.arange(0, tile.WIDE), column + tl.arange(0, tile.BLOCK_V)
    base = states + (pair.to(tl.int64) * chunks + chunk) * (tile.V * tile.D)
    return base + (v[None, :] * tile.D + d[:, None]), (d < tile.D)[:, None] & (v < tile.V)[None, :]


@triton.jit
def keep_state(states, state, pair, chunk, chunks, column, tile):
    """Writes a chunk's state, transposed: [V, D]."""
    at, inside = _places(states, pair, chunk, chunks, column, tile)
    tl.store(at, state.to(states.dtype.element_ty), mask=inside)


@triton.jit
def kept_state(states, pair, chunk, chunks, column, tile):
    """A chunk's state [WIDE, BLOCK_V], as it was kept."""
    at, inside = _places(states, pair, chunk, chunks, column, tile)
    return tl.load(at, mask=inside, other=0.0)
