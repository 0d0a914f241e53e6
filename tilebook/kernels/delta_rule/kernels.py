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
    square,
    whose,
)
from tilebook.kernels.linear_attention.pytorch import LEAST

_LEAST = tl.constexpr(LEAST)
_EPS = tl.constexpr(EPS)
_BLOCK = tl.constexpr(16)
"""Rows of blocks that are inverted by substitution."""


@triton.jit
def _diagonal_blocks(a, COUNT: tl.constexpr):
    """The blocks on the diagonals of matrices: [·, COUNT, 16, 16]."""
    b = tl.arange(0, COUNT)
    five = tl.reshape(a, [a.shape[0], COUNT, _BLOCK, COUNT, _BLOCK])
    return tl.sum(tl.where(b[None, :, None, None, None] == b[None, None, None, :, None], five, 0.0), 3)


@triton.jit
def _solved(a):
    """(I + a)⁻¹ of blocks below diagonals, one column of `a` after the other."""
    r = tl.arange(0, _BLOCK)
    found = tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, None, :, :] + tl.zeros_like(a)
    for step in tl.range(0, _BLOCK - 1):
        column = tl.sum(tl.where(r[None, None, None, :] == step, a, 0.0), 3)
        row = tl.sum(tl.where(r[None, None, :, None] == step, found, 0.0), 2)
        found -= column[:, :, :, None] * row[:, :, None, :]
    return found


@triton.jit
def _picked(x, which: tl.constexpr, AXIS: tl.constexpr):
    """One of the matrices that lie side by side along an axis."""
    b = tl.arange(0, x.shape[AXIS])
    if AXIS == 0:
        found = tl.sum(tl.where(b[:, None, None] == which, x, 0.0), 0)
    else:
        found = tl.sum(tl.where(b[None, :, None, None] == which, x, 0.0), 1)
    return found


@triton.jit
def _between(lower, across, upper, tile):
    """What the inverse of a matrix has below the inverses of its two halves: −T₂₂ A₂₁ T₁₁."""
    inner = tl.dot(across, upper, input_precision=tile.MERGE)
    return -tl.dot(lower, inner, input_precision=tile.MERGE)


@triton.jit
def inverted(a, COUNT: tl.constexpr, tile):
    """(I + a)⁻¹ of matrices [·, 16 COUNT, 16 COUNT] below diagonals, in fp32; COUNT is 1 or 2."""
    parts: tl.constexpr = a.shape[0]
    b, two = tl.arange(0, COUNT), tl.arange(0, 2)
    blocks = _solved(_diagonal_blocks(a, COUNT))
    own = b[None, :, None, None, None] == b[None, None, None, :, None]
    found = tl.where(own, blocks[:, :, :, None, :], 0.0)
    if COUNT == 2:
        place = (two[None, :, None, None, None] == 1) & (two[None, None, None, :, None] == 0)
        across = tl.where(place, tl.reshape(a, [parts, 2, _BLOCK, 2, _BLOCK]), 0.0)
        below = _between(_picked(blocks, 1, 1), tl.sum(tl.sum(across, 3), 1), _picked(blocks, 0, 1), tile)
        found += tl.where(place, below[:, None, :, None, :], 0.0)
    return tl.reshape(found, [parts, COUNT * _BLOCK, COUNT * _BLOCK])


@triton.jit
def _decays(g, token, n, step, there):
    """Log-decays of tokens, 0 of those that are not `there`. g: of the head."""
    return tl.maximum(tl.load(g + token.to(tl.int64) * step, mask=there, other=0.0).to(tl.float32), _LEAST)


@triton.jit
def _lines(g, beta, lines, pair, token, n, g_s, b_s, tile, DECAY: tl.constexpr):
    """Sums of a chunk's log-decays up to each token, and β; both are written, and the sums behind each token."""
    r = tl.arange(0, tile.CHUNK)
    inside, first = r < n - token, token + r
    c, rest = tl.zeros([tile.CHUNK], tl.float32), tl.zeros([tile.CHUNK], tl.float32)
    if DECAY:
        c = tl.cumsum(_decays(g, first, n, g_s, inside), 0)
        after = _decays(g, first + 1, n, g_s, (r + 1 < n - token) & (r + 1 < tile.CHUNK))
        rest = tl.cumsum(after, 0, reverse=True)  # a difference of sums would be their rounding
    rate = tl.load(beta + first.to(tl.int64) * b_s, mask=inside, other=0.0).to(tl.float32)
    tl.store(line(lines, pair, 0, n, tile) + first, c, mask=inside)
    tl.store(line(lines, pair, 1, n, tile) + first, rest, mask=inside)
    tl.store(line(lines, pair, 2, n, tile) + first, rate, mask=inside)
    return c, rate


@triton.jit
def _some(x, batch, head, token, n, column, HALVES: tl.constexpr, SIZE: tl.constexpr, tile):
    """Columns of a chunk's rows by halves: [HALVES, SIZE, columns]."""
    base = x.source + batch.to(tl.int64) * x.b + head.to(tl.int64) * x.h + token.to(tl.int64) * x.s
    h, r, d = tl.arange(0, HALVES), tl.arange(0, SIZE), column + tl.arange(0, tile.SLICE)
    row = h[:, None] * SIZE + r[None, :]
    inside = (row[:, :, None] < n - token) & (d[None, None, :] < tile.D)
    return tl.load(base + (row[:, :, None] * x.s + d[None, None, :]), mask=inside, other=0.0)


@triton.jit
def _lengths(squares, lines, pair, which: tl.constexpr, token, n, tile):
    """What rows are to be multiplied by, of the squares of their lengths."""
    h, r = tl.arange(0, squares.shape[0]), tl.arange(0, squares.shape[1])
    at = token + h[:, None] * squares.shape[1] + r[None, :]
    found = tl.full(squares.shape, 1.0, tl.float32)
    if tile.NORM:
        found = tl.rsqrt(squares + _EPS)
        tl.store(line(lines, pair, which, n, tile) + at, found, mask=at < n)
    return found


@triton.jit
def _put_square(x, values, pair, chunk, chunks, row, column, tile):
    """A square of a chunk's matrix."""
    r = tl.arange(0, values.shape[0])
    base = x + (pair.to(tl.int64) * chunks + chunk) * (tile.CHUNK * tile.CHUNK) + row * tile.CHUNK + column
    tl.store(base + (r[:, None] * tile.CHUNK + r[None, :]), values.to(x.dtype.element_ty))


@triton.jit
def _put_halves(x, values, pair, chunk, chunks, tile):
    """The squares on the diagonal of a chunk's matrix."""
    h, r = tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    base = x + (pair.to(tl.int64) * chunks + chunk) * (tile.CHUNK * tile.CHUNK)
    at = (h[:, None, None] * values.shape[1] + r[None, :, None]) * tile.CHUNK
    at += h[:, None, None] * values.shape[1] + r[None, None, :]
    tl.store(base + at, values.to(x.dtype.element_ty))


@triton.jit
def _half(x, which: tl.constexpr):
    """One half of numbers of tokens."""
    h = tl.arange(0, 2)
    return tl.sum(tl.where(h[:, None] == which, x, 0.0), 0)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_s", "b_b", "b_h", "b_s", "heads", "n"])
def pairs_kernel(
    q, k, g, beta, lines, inverse, scores, g_b, g_h, g_s, b_b, b_h, b_s, heads, n, scale, tile, DECAY: tl.constexpr
):
    """T and s of one chunk, and what other kernels want of its tokens (see `line`).

    Of 64 tokens there are two matrices side by side, one of either half, and then what the halves have with each other.
    """
    pair, chunk = tl.program_id(0), tl.program_id(1)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    HALVES: tl.constexpr = 2 if tile.CHUNK == 64 else 1
    SIZE: tl.constexpr = tile.CHUNK // HALVES
    g += batch.to(tl.int64) * g_b + head.to(tl.int64) * g_h
    beta += batch.to(tl.int64) * b_b + head.to(tl.int64) * b_h
    c, rate = _lines(g, beta, lines, pair, token, n, g_s, b_s, tile, DECAY)
    c, rate = tl.reshape(c, [HALVES, SIZE]), tl.reshape(rate, [HALVES, SIZE])
    s, a = tl.zeros([HALVES, SIZE, SIZE], tl.float32), tl.zeros([HALVES, SIZE, SIZE], tl.float32)
    of_query, of_key = tl.zeros([HALVES, SIZE], tl.float32), tl.zeros([HALVES, SIZE], tl.float32)
    for column in tl.static_range(0, tile.WIDE, tile.SLICE):
        queries = _some(q, batch, head, token, n, column, HALVES, SIZE, tile)
        keys = _some(k, batch, head, token, n, column, HALVES, SIZE, tile)
        s += dot(queries, tl.permute(keys, (0, 2, 1)), tile)
        a += dot(keys, tl.permute(keys, (0, 2, 1)), tile)
        if tile.NORM:
            of_query += tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 2)
            of_key += tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 2)
    of_query = _lengths(of_query, lines, pair, 4, token, n, tile) * scale
    of_key = _lengths(of_key, lines, pair, 3, token, n, tile)
    r = tl.arange(0, SIZE)
    weight = tl.where((r[:, None] >= r[None, :])[None, :, :], c[:, :, None] - c[:, None, :], -float("inf"))
    weight = tl.exp(weight) * of_key[:, None, :]
    _put_halves(scores, s * weight * of_query[:, :, None], pair, chunk, chunks, tile)
    a = tl.where((r[:, None] > r[None, :])[None, :, :], a * weight * (of_key * rate)[:, :, None], 0.0)
    found = inverted(a, SIZE // _BLOCK, tile)
    _put_halves(inverse, found, pair, chunk, chunks, tile)
    if HALVES == 2:
        s, a = tl.zeros([SIZE, SIZE], tl.float32), tl.zeros([SIZE, SIZE], tl.float32)
        for column in tl.static_range(0, tile.WIDE, tile.SLICE):
            others = tl.trans(read(k, batch, head, token, n, column, SIZE, tile.D, tile.SLICE))
            s += dot(read(q, batch, head, token + SIZE, n, column, SIZE, tile.D, tile.SLICE), others, tile)
            a += dot(read(k, batch, head, token + SIZE, n, column, SIZE, tile.D, tile.SLICE), others, tile)
        weight = tl.exp(_half(c, 1)[:, None] - _half(c, 0)[None, :]) * _half(of_key, 0)[None, :]
        _put_square(scores, s * weight * _half(of_query, 1)[:, None], pair, chunk, chunks, SIZE, 0, tile)
        a = a * weight * _half(of_key * rate, 1)[:, None]
        below = _between(_picked(found, 1, 0), a, _picked(found, 0, 0), tile)
        _put_square(inverse, below, pair, chunk, chunks, SIZE, 0, tile)
        nothing = tl.zeros([SIZE, SIZE], tl.float32)
        _put_square(inverse, nothing, pair, chunk, chunks, 0, SIZE, tile)
        _put_square(scores, nothing, pair, chunk, chunks, 0, SIZE, tile)


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
