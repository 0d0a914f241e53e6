"""Triton kernels of the gradients of the gated delta rule; names as in `kernels`.

One walks backwards along the chunks with the gradient of the state, dh: dy = sᵀ do + e^(c_last − c) k dh, and of
y = T z, z = β (v − e^c k h), the gradient of z is Tᵀ dy. As dA = −dz yᵀ, no other kernel has the inverses. The other finds
the gradients of all chunks at once, of the states in front of them and the gradients of those behind.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.tiles import dot, factored, put
from tilebook.kernels.delta_rule.tiles import begun, ended, keep_state, kept_state, numbers, read, seen, square, whose


@triton.jit(do_not_specialize=["heads", "n"])
def return_kernel(do, q, k, lines, inverse, scores, init, final, grads, dz, dv, heads, n, scale, tile):
    """Backwards along all chunks: the gradients of the states behind them, of z, and of v."""
    column, head, batch, pair = whose(heads, tile)
    chunks = tl.cdiv(n, tile.CHUNK)
    grad = begun(init, batch, head, column, tile)
    for step in tl.range(0, chunks):
        chunk = chunks - 1 - step
        token = chunk * tile.CHUNK
        keep_state(grads, grad, pair, chunk, chunks, column, tile)
        keys = read(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
        queries = read(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
        above = read(do, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        _, last, rate, into, out, ask, _, _ = numbers(lines, pair, token, n, scale, tile)
        behind = factored(grad, keys)
        dy = dot(keys, behind[0], tile) * (out * behind[1])[:, None]
        dy += dot(tl.trans(tl.load(square(scores, pair, chunk, chunks, tile))), above, tile)
        found = dot(tl.trans(tl.load(square(inverse, pair, chunk, chunks, tile))), dy.to(keys.dtype), tile)
        put(dz, found, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        found *= rate[:, None]
        put(dv, found, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        grad = grad * tl.exp(last)
        grad += dot(tl.trans(queries), (above * ask[:, None]).to(keys.dtype), tile)
        grad -= dot(tl.trans(keys), (found * into[:, None]).to(keys.dtype), tile)
    ended(final, grad, batch, head, column, tile)


@triton.jit
def _through(change, rows, length, AXIS: tl.constexpr):
    """The gradient of rows that are divided by their lengths, of that in which the lengths were constants."""
    along = tl.sum(change * rows, AXIS) * (length * length)
    return change - rows * (along[None, :] if AXIS == 0 else along[:, None])


@triton.jit(do_not_specialize=["heads", "n"])
def gradients_kernel(
    do,
    q,
    k,
    v,
    written,
    dz,
    lines,
    scores,
    states,
    grads,
    dq,
    dk,
    dg,
    dbeta,
    heads,
    n,
    scale,
    tile,
    DECAY: tl.constexpr,
):
    """Gradients of one chunk's queries, keys, log-decays and rates.

    The gradient of a log-decay is the sum of all that passes from before a token to it or to one after it. Matrices of
    pairs stand the other way round, [j, i], and so do two of the sums over columns, [D, i]: on Hopper Triton 3.4 to
    3.7.0 makes wrong numbers of products with a factor that is another product, transposed.
    """
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    keys = read(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    queries = read(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    c, last, rate, into, out, ask, of_key, of_query = numbers(lines, pair, token, n, scale, tile)
    answered = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    corrected = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    inter = tl.zeros([tile.WIDE, tile.CHUNK], tl.float32)
    known = tl.zeros([tile.WIDE, tile.CHUNK], tl.float32)
    outward = tl.zeros([tile.CHUNK, tile.WIDE], tl.float32)
    through, drate = tl.zeros([tile.WIDE], tl.float32), tl.zeros([tile.CHUNK], tl.float32)
    for column in tl.range(0, tile.V, tile.BLOCK_V):
        above = read(do, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        values = read(v, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        y = read(written, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        back = read(dz, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        state = kept_state(states, pair, chunk, chunks, column, tile)
        grad = kept_state(grads, pair, chunk, chunks, column, tile)
        if DECAY:
            through += tl.sum(grad.to(tl.float32) * state.to(tl.float32), 1)
        drate += tl.sum(back.to(tl.float32) * values.to(tl.float32), 1)
        answered += dot(y, tl.trans(above), tile)
        corrected += dot(y, tl.trans(back), tile)
        old, behind = factored(state, above), factored(grad, y)
        inter += dot(old[0], tl.trans(above), tile) * old[1]
        known += dot(old[0], tl.trans(back), tile) * old[1]
        outward += dot(y, tl.trans(behind[0]), tile) * behind[1]
    turned_keys, turned_queries = tl.trans(keys).to(tl.float32), tl.trans(queries).to(tl.float32)
    read_back = tl.sum(known * turned_keys, 0) * into
    weight = seen(c, tile, True) * of_key[:, None]
    alike = dot(keys, tl.trans(keys), tile)
    corrected = tl.where(r[:, None] < r[None, :], -corrected * weight * of_key[None, :], 0.0)
    drate += tl.sum(corrected * alike, 0) - read_back
    corrected *= rate[None, :]
    inter, known, outward = inter * ask[None, :], known * (-rate * into)[None, :], outward * out[:, None]
    at = pair.to(tl.int64) * n + token + r
    tl.store(dbeta + at, drate, mask=r < n - token)
    if DECAY:
        s = tl.trans(tl.load(square(scores, pair, chunk, chunks, tile))).to(tl.float32)
        p = tl.where(r[:, None] < r[None, :], s * answered, 0.0) + corrected * alike
        passed = tl.sum(p, 0) - tl.sum(p, 1) + tl.sum(inter * turned_queries, 0) - rate * read_back
        left = tl.sum(outward * keys, 1)
        found = tl.cumsum(passed, 0, reverse=True) + (tl.cumsum(left, 0) - left) + tl.exp(last) * tl.sum(through, 0)
        tl.store(dg + at, found, mask=r < n - token)
    asked, changed = (answered * weight * (of_query * scale)[None, :]).to(keys.dtype), corrected.to(keys.dtype)
    inter += dot(tl.trans(keys), asked, tile)
    known += dot(tl.trans(keys), changed, tile)
    outward += dot(asked, queries, tile)
    outward += dot(changed, keys, tile)
    outward += tl.trans(known)
    if tile.NORM:
        outward = _through(outward, keys.to(tl.float32), of_key, 1)
        inter = _through(inter, turned_queries, of_query, 0)
    put(dk, outward, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    put(dq, tl.trans(inter), batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
