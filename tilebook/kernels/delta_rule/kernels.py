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

from tilebook.kernels.bidirectional.tiles import dot, put
from tilebook.kernels.delta_rule.pytorch import EPS
from tilebook.kernels.delta_rule.tiles import (
    begun,
    ended,
    factored,
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
    """The blocks on the diagonal of a matrix: [COUNT, 16, 16]."""
    b = tl.arange(0, COUNT)
    four = tl.reshape(a, [COUNT, _BLOCK, COUNT, _BLOCK])
    return tl.sum(tl.where(b[:, None, None, None] == b[None, None, :, None], four, 0.0), 2)


@triton.jit
def _solved(a):
    """(I + a)⁻¹ of blocks below diagonals, one column of `a` after the other."""
    r = tl.arange(0, _BLOCK)
    found = tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :] + tl.zeros_like(a)
    for step in tl.range(0, _BLOCK - 1):
        column = tl.sum(tl.where(r[None, None, :] == step, a, 0.0), 2)
        row = tl.sum(tl.where(r[None, :, None] == step, found, 0.0), 1)
        found -= column[:, :, None] * row[:, None, :]
    return found


@triton.jit
def _below(lower, across, upper, tile):
    """What the inverse of a matrix has below the inverses of its two halves: −T₂₂ A₂₁ T₁₁."""
    inner = tl.dot(across, upper, input_precision=tile.MERGE)
    return -tl.dot(lower, inner, input_precision=tile.MERGE)


@triton.jit
def inverted(a, COUNT: tl.constexpr, tile):
    """(I + a)⁻¹ of a matrix [16 COUNT, 16 COUNT] below its diagonal, in fp32; COUNT is 1 or 2."""
    b, two = tl.arange(0, COUNT), tl.arange(0, 2)
    blocks = _solved(_diagonal_blocks(a, COUNT))
    found = tl.where(b[:, None, None, None] == b[None, None, :, None], blocks[:, :, None, :], 0.0)
    if COUNT == 2:
        place = (two[:, None, None, None] == 1) & (two[None, None, :, None] == 0)
        across = tl.sum(tl.sum(tl.where(place, tl.reshape(a, [2, _BLOCK, 2, _BLOCK]), 0.0), 2), 0)
        upper = tl.sum(tl.where(two[:, None, None] == 0, blocks, 0.0), 0)
        lower = tl.sum(tl.where(two[:, None, None] == 1, blocks, 0.0), 0)
        found += tl.where(place, _below(lower, across, upper, tile)[None, :, None, :], 0.0)
    return tl.reshape(found, [COUNT * _BLOCK, COUNT * _BLOCK])


@triton.jit
def _decays(g, token, n, step, there):
    """Log-decays of tokens, 0 of those that are not `there`. g: of the head."""
    return tl.maximum(tl.load(g + token.to(tl.int64) * step, mask=there, other=0.0).to(tl.float32), _LEAST)


@triton.jit
def _write_lines(g, beta, lines, pair, token, n, g_s, b_s, tile, DECAY: tl.constexpr):
    """Of a chunk: sums of log-decays up to each token, those behind it, and β."""
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


@triton.jit
def _products(q, k, batch, head, token, others, n, SIZE: tl.constexpr, tile):
    """q_i · k_j and k_i · k_j of tokens i from `token` on and j from `others` on, and |q_i|² and |k_i|²."""
    s, a = tl.zeros([SIZE, SIZE], tl.float32), tl.zeros([SIZE, SIZE], tl.float32)
    of_query, of_key = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    for column in tl.range(0, tile.D, tile.SLICE):
        queries = read(q, batch, head, token, n, column, SIZE, tile.D, tile.SLICE)
        keys = read(k, batch, head, token, n, column, SIZE, tile.D, tile.SLICE)
        before = tl.trans(read(k, batch, head, others, n, column, SIZE, tile.D, tile.SLICE))
        s += dot(queries, before, tile)
        a += dot(keys, before, tile)
        of_query += tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1)
        of_key += tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 1)
    return s, a, of_query, of_key


@triton.jit
def _put_square(x, values, pair, chunk, chunks, row, column, tile):
    """A square of a chunk's matrix."""
    r = tl.arange(0, values.shape[0])
    base = x + (pair.to(tl.int64) * chunks + chunk) * (tile.CHUNK * tile.CHUNK) + row * tile.CHUNK + column
    tl.store(base + (r[:, None] * tile.CHUNK + r[None, :]), values.to(x.dtype.element_ty))


@triton.jit(do_not_specialize=["g_b", "g_h", "g_s", "b_b", "b_h", "b_s", "heads", "n"])
def pairs_kernel(
    q, k, g, beta, lines, inverse, scores, g_b, g_h, g_s, b_b, b_h, b_s, heads, n, scale, tile, DECAY: tl.constexpr
):
    """T and s of one chunk, and what other kernels want of its tokens (see `line`).

    Of 64 tokens either half is a matrix, and what the second has with the first another: one warp can hold these.
    """
    pair, chunk = tl.program_id(0), tl.program_id(1)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    SIZE: tl.constexpr = 32 if tile.CHUNK == 64 else tile.CHUNK
    g += batch.to(tl.int64) * g_b + head.to(tl.int64) * g_h
    beta += batch.to(tl.int64) * b_b + head.to(tl.int64) * b_h
    _write_lines(g, beta, lines, pair, token, n, g_s, b_s, tile, DECAY)
    r, last, upper = tl.arange(0, SIZE), 0.0, tl.zeros([SIZE, SIZE], tl.float32)
    c_before, length_before = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    for half in tl.range(0, tile.CHUNK // SIZE):
        first = token + half * SIZE
        at, inside = first + r, first + r < n
        c = tl.zeros([SIZE], tl.float32)
        if DECAY:
            c = tl.cumsum(_decays(g, at, n, g_s, inside), 0) + last
            last = tl.min(c, 0)
        s, a, of_query, of_key = _products(q, k, batch, head, first, first, n, SIZE, tile)
        if tile.NORM:
            of_query, of_key = tl.rsqrt(of_query + _EPS), tl.rsqrt(of_key + _EPS)
            tl.store(line(lines, pair, 3, n, tile) + at, of_key, mask=inside)
            tl.store(line(lines, pair, 4, n, tile) + at, of_query, mask=inside)
        else:
            of_query, of_key = tl.full([SIZE], 1.0, tl.float32), tl.full([SIZE], 1.0, tl.float32)
        of_row = tl.load(beta + at.to(tl.int64) * b_s, mask=inside, other=0.0).to(tl.float32) * of_key
        weight = tl.exp(tl.where(r[:, None] >= r[None, :], c[:, None] - c[None, :], -float("inf"))) * of_key[None, :]
        _put_square(
            scores, s * weight * (of_query * scale)[:, None], pair, chunk, chunks, half * SIZE, half * SIZE, tile
        )
        a = tl.where(r[:, None] > r[None, :], a * weight * of_row[:, None], 0.0)
        found = inverted(a, SIZE // _BLOCK, tile)
        _put_square(inverse, found, pair, chunk, chunks, half * SIZE, half * SIZE, tile)
        if tile.CHUNK != SIZE:
            if half == 1:
                s, a, _, _ = _products(q, k, batch, head, first, token, n, SIZE, tile)
                weight = tl.exp(c[:, None] - c_before[None, :]) * length_before[None, :]
                _put_square(scores, s * weight * (of_query * scale)[:, None], pair, chunk, chunks, SIZE, 0, tile)
                across = _below(found, a * weight * of_row[:, None], upper, tile)
                _put_square(inverse, across, pair, chunk, chunks, SIZE, 0, tile)
                nothing = tl.zeros([SIZE, SIZE], tl.float32)
                _put_square(inverse, nothing, pair, chunk, chunks, 0, SIZE, tile)
                _put_square(scores, nothing, pair, chunk, chunks, 0, SIZE, tile)
            upper, c_before, length_before = found, c, of_key


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
