"""Triton kernels of the gated delta rule, by chunks of tokens.

With c the running sum of a chunk's log-decays and h the state [D, V] before it, what its tokens write are the rows of
y = T β (v − e^c k h), T = (I + A)⁻¹, A_ij = β_i e^(c_i − c_j) k_i · k_j for j < i. Then o = scale e^c q h + s y, s_ij =
scale e^(c_i − c_j) q_i · k_j for j ≤ i, and the state behind is e^(c_last) h + (e^(c_last − c) k)ᵀ y.

One kernel finds T and s of all chunks at once. One walks along the chunks with the state in registers; it writes o, or
leaves states and y to a kernel that finds o of all chunks at once. Rows of q and k that are to be divided by their
lengths are multiplied as they are, and products by what that comes to.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.tiles import dot, factored, put
from tilebook.kernels.delta_rule.pytorch import EPS
from tilebook.kernels.delta_rule.tiles import (
    begun,
    ended,
    keep_state,
    kept_state,
    line,
    numbers,
    read,
    seen,
    square,
    whose,
)
from tilebook.kernels.linear_attention.pytorch import LEAST

_LEAST = tl.constexpr(LEAST)
_EPS = tl.constexpr(EPS)
_BLOCK = tl.constexpr(16)
"""Rows of blocks that are inverted by substitution."""


@triton.jit
def _blocks(a, COUNT: tl.constexpr):
    """The blocks on the diagonal: [COUNT, 16, 16]."""
    if COUNT == 1:
        found = tl.reshape(a, [1, _BLOCK, _BLOCK])
    else:
        b = tl.arange(0, COUNT)
        four = tl.reshape(a, [COUNT, _BLOCK, COUNT, _BLOCK])
        found = tl.sum(tl.where(b[:, None, None, None] == b[None, None, :, None], four, 0.0), 2)
    return found


@triton.jit
def _substituted(a, COUNT: tl.constexpr):
    """(I + a)⁻¹ of blocks below whose diagonals `a` is, one column of `a` after the other."""
    r = tl.arange(0, _BLOCK)
    found = tl.zeros([COUNT, _BLOCK, _BLOCK], tl.float32) + tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :]
    for step in tl.range(0, _BLOCK - 1):
        column = tl.sum(tl.where(r[None, None, :] == step, a, 0.0), 2)
        row = tl.sum(tl.where(r[None, :, None] == step, found, 0.0), 1)
        found -= column[:, :, None] * row[:, None, :]
    return found


@triton.jit
def _part(x, PAIRS: tl.constexpr, SIZE: tl.constexpr, LOWER: tl.constexpr, RIGHT: tl.constexpr):
    """Of each pair of neighbouring blocks on the diagonal of x one of the four, side by side on a diagonal."""
    p, two = tl.arange(0, PAIRS), tl.arange(0, 2)
    six = tl.reshape(x, [PAIRS, 2, SIZE, PAIRS, 2, SIZE])
    own = p[:, None, None, None, None, None] == p[None, None, None, :, None, None]
    own = own & (two[None, :, None, None, None, None] == LOWER) & (two[None, None, None, None, :, None] == RIGHT)
    return tl.reshape(tl.sum(tl.sum(tl.where(own, six, 0.0), 4), 1), [PAIRS * SIZE, PAIRS * SIZE])


@triton.jit
def _merged(found, a, PAIRS: tl.constexpr, SIZE: tl.constexpr, tile):
    """Inverses of blocks twice as large: below the diagonal −T₂₂ A₂₁ T₁₁."""
    upper, lower = _part(found, PAIRS, SIZE, 0, 0), _part(found, PAIRS, SIZE, 1, 1)
    inner = tl.dot(_part(a, PAIRS, SIZE, 1, 0), upper, input_precision=tile.MERGE)
    outer = tl.dot(lower, inner, input_precision=tile.MERGE)
    two = tl.arange(0, 2)
    place = (two[None, :, None, None, None, None] == 1) & (two[None, None, None, None, :, None] == 0)
    six = tl.where(place, tl.reshape(outer, [PAIRS, 1, SIZE, PAIRS, 1, SIZE]), 0.0)
    return found - tl.reshape(six, [tile.CHUNK, tile.CHUNK])


@triton.jit
def inverted(a, tile):
    """(I + a)⁻¹ of `a` [CHUNK, CHUNK] below a diagonal, in fp32: blocks by substitution, then in pairs."""
    count: tl.constexpr = tile.CHUNK // _BLOCK
    blocks = _substituted(_blocks(a, count), count)
    if count == 1:
        found = tl.reshape(blocks, [_BLOCK, _BLOCK])
    else:
        b = tl.arange(0, count)
        own = b[:, None, None, None] == b[None, None, :, None]
        found = tl.reshape(tl.where(own, blocks[:, :, None, :], 0.0), [tile.CHUNK, tile.CHUNK])
    if count == 2:
        found = _merged(found, a, 1, _BLOCK, tile)
    if count == 4:
        found = _merged(found, a, 2, _BLOCK, tile)
        found = _merged(found, a, 1, 2 * _BLOCK, tile)
    return found


@triton.jit
def _decays(g, token, n, step, there):
    """Log-decays of tokens, 0 of those that are not `there`. g: of the head."""
    return tl.maximum(tl.load(g + token.to(tl.int64) * step, mask=there, other=0.0).to(tl.float32), _LEAST)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_s", "b_b", "b_h", "b_s", "heads", "n"])
def pairs_kernel(
    q, k, g, beta, lines, inverse, scores, g_b, g_h, g_s, b_b, b_h, b_s, heads, n, scale, tile, DECAY: tl.constexpr
):
    """T and s of one chunk, and what other kernels want of its tokens (see `line`)."""
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    inside, first = r < n - token, token + r
    c, rest = tl.zeros([tile.CHUNK], tl.float32), tl.zeros([tile.CHUNK], tl.float32)
    if DECAY:
        of_head = g + batch.to(tl.int64) * g_b + head.to(tl.int64) * g_h
        c = tl.cumsum(_decays(of_head, first, n, g_s, inside), 0)
        after = _decays(of_head, first + 1, n, g_s, (r + 1 < n - token) & (r + 1 < tile.CHUNK))
        rest = tl.cumsum(after, 0, reverse=True)  # a difference of sums would be their rounding
    tl.store(line(lines, pair, 0, n, tile) + first, c, mask=inside)
    tl.store(line(lines, pair, 1, n, tile) + first, rest, mask=inside)
    of_head = beta + batch.to(tl.int64) * b_b + head.to(tl.int64) * b_h
    rate = tl.load(of_head + first.to(tl.int64) * b_s, mask=inside, other=0.0).to(tl.float32)
    tl.store(line(lines, pair, 2, n, tile) + first, rate, mask=inside)
    keys = read(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    queries = read(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    of_key, of_query = tl.full([tile.CHUNK], 1.0, tl.float32), tl.full([tile.CHUNK], 1.0, tl.float32)
    if tile.NORM:
        of_key = tl.rsqrt(tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 1) + _EPS)
        of_query = tl.rsqrt(tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1) + _EPS)
        tl.store(line(lines, pair, 3, n, tile) + first, of_key, mask=inside)
        tl.store(line(lines, pair, 4, n, tile) + first, of_query, mask=inside)
    weight = seen(c, tile) * of_key[None, :]
    s = dot(queries, tl.trans(keys), tile) * weight * (of_query * scale)[:, None]
    tl.store(square(scores, pair, chunk, chunks, tile), s.to(scores.dtype.element_ty))
    a = dot(keys, tl.trans(keys), tile) * weight * (of_key * rate)[:, None]
    found = inverted(tl.where(r[:, None] > r[None, :], a, 0.0), tile)
    tl.store(square(inverse, pair, chunk, chunks, tile), found.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["heads", "n"])
def walk_kernel(
    q, k, v, lines, inverse, scores, init, final, states, written, o, heads, n, scale, tile,
    KEEP: tl.constexpr, ANSWER: tl.constexpr,
):  # fmt: skip
    """Along all chunks with the state in registers. KEEP: writes the states in front of chunks, and y, to `written`.

    ANSWER: writes o.
    """
    column, head, batch, pair = whose(heads, tile)
    chunks = tl.cdiv(n, tile.CHUNK)
    state = begun(init, batch, head, column, tile)
    for chunk in tl.range(0, chunks):
        token = chunk * tile.CHUNK
        if KEEP:
            keep_state(states, state, pair, chunk, chunks, column, tile)
        keys = read(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
        values = read(v, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        _, last, rate, into, out, ask, _, _ = numbers(lines, pair, token, n, scale, tile)
        old = factored(state, keys)
        known = dot(keys, old[0], tile) * (into * old[1])[:, None]
        wrong = (values - known) * rate[:, None]
        y = dot(tl.load(square(inverse, pair, chunk, chunks, tile)), wrong.to(keys.dtype), tile)
        if KEEP:
            put(written, y, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        if ANSWER:
            queries = read(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
            acc = dot(queries, old[0], tile) * (ask * old[1])[:, None]
            acc += dot(tl.load(square(scores, pair, chunk, chunks, tile)), y.to(keys.dtype), tile)
            put(o, acc, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        state = state * tl.exp(last)
        state += dot(tl.trans(keys), (y * out[:, None]).to(keys.dtype), tile)
    ended(final, state, batch, head, column, tile)


@triton.jit(do_not_specialize=["heads", "n"])
def answers_kernel(q, lines, scores, states, written, o, heads, n, scale, tile):
    """o of one chunk, of the state in front of it and of y."""
    column, head, batch, pair = whose(heads, tile)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    token = chunk * tile.CHUNK
    queries = read(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    y = read(written, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
    _, _, _, _, _, ask, _, _ = numbers(lines, pair, token, n, scale, tile)
    old = factored(kept_state(states, pair, chunk, chunks, column, tile), queries)
    acc = dot(queries, old[0], tile) * (ask * old[1])[:, None]
    acc += dot(tl.load(square(scores, pair, chunk, chunks, tile)), y, tile)
    put(o, acc, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
