"""Triton kernels of the gradients of the gated delta rule; names as in `kernels`.

One walks backwards along the chunks with the gradient of the state, dh: dy = sᵀ do + e^(c_last − c) k dh, and of
y = T z, z = β (v − e^c k h), the gradient of z is Tᵀ dy. As dA = −dz yᵀ, no other kernel has the inverses. Two kernels
take all chunks at once: one finds what pairs of tokens contribute to gradients, the other gradients, of the states in
front of chunks and the gradients of those behind. No factor of a product is another product, transposed: of these
Triton 3.4 to 3.7.0 makes wrong numbers on Hopper.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.tiles import dot, preceding, put
from tilebook.kernels.delta_rule.tiles import (
    begun,
    ended,
    factored,
    keep_state,
    kept_state,
    numbers,
    read,
    seen,
    square,
    whose,
)


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


@triton.jit(do_not_specialize=["heads", "n"])
def changes_kernel(
    do, k, v, written, dz, lines, scores, asked, changed, dg, dbeta, along, heads, n, scale, tile, DECAY: tl.constexpr
):
    """Of one chunk: what q_i · k_j is to change by, to `asked`, and what k_i · k_j is to, to `changed`.

    And what of the gradients of log-decays and rates, and of what lies along keys and queries, is sums over pairs.
    """
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    answered = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    corrected, drate = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32), tl.zeros([tile.CHUNK], tl.float32)
    for column in tl.range(0, tile.V, tile.BLOCK_V):
        above = read(do, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        y = read(written, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        back = read(dz, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        values = read(v, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        answered += dot(above, tl.trans(y), tile)
        corrected += dot(back, tl.trans(y), tile)
        drate += tl.sum(back.to(tl.float32) * values.to(tl.float32), 1)
    keys = read(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    c, _, rate, _, _, _, of_key, of_query = numbers(lines, pair, token, n, scale, tile)
    inside, at = r < n - token, pair.to(tl.int64) * n + token + r
    weight = seen(c, tile) * of_key[None, :]
    corrected = tl.where(r[:, None] > r[None, :], -corrected * weight * of_key[:, None], 0.0)
    alike = dot(keys, tl.trans(keys), tile) * corrected
    by_key = tl.sum(alike, 1)
    tl.store(dbeta + at, drate + by_key, mask=inside)
    alike *= rate[:, None]
    tl.store(square(changed, pair, chunk, chunks, tile), (corrected * rate[:, None]).to(changed.dtype.element_ty))
    weight = answered * weight * (of_query * scale)[:, None]
    tl.store(square(asked, pair, chunk, chunks, tile), weight.to(asked.dtype.element_ty))
    if DECAY or tile.NORM:
        s = tl.load(square(scores, pair, chunk, chunks, tile)).to(tl.float32) * answered
        itself = tl.sum(tl.where(r[:, None] == r[None, :], s, 0.0), 1)
        s = tl.where(r[:, None] == r[None, :], 0.0, s)
        late, early, by_query, to_key = tl.sum(alike, 1), tl.sum(alike, 0), tl.sum(s, 1), tl.sum(s, 0)
        if DECAY:
            tl.store(dg + at, late - early + by_query - to_key, mask=inside)
        if tile.NORM:
            first = along + pair.to(tl.int64) * (2 * n) + token + r
            tl.store(first, late + early + to_key + itself, mask=inside)
            tl.store(first + n, by_query + itself, mask=inside)


@triton.jit(do_not_specialize=["heads", "n"])
def gradients_kernel(
    do,
    q,
    k,
    written,
    dz,
    lines,
    asked,
    changed,
    states,
    grads,
    dq,
    dk,
    dg,
    dbeta,
    along,
    heads,
    n,
    scale,
    tile,
    DECAY: tl.constexpr,
):
    """Gradients of one chunk's queries, keys, log-decays and rates, the latter two of what is there already.

    The gradient of a log-decay is the sum of all that passes from before a token to it or to one after it.
    """
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    inter = tl.zeros([tile.CHUNK, tile.WIDE], tl.float32)
    known = tl.zeros([tile.CHUNK, tile.WIDE], tl.float32)
    outward = tl.zeros([tile.CHUNK, tile.WIDE], tl.float32)
    through = tl.zeros([tile.WIDE], tl.float32)
    for column in tl.range(0, tile.V, tile.BLOCK_V):
        above = read(do, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        y = read(written, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        back = read(dz, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        state = kept_state(states, pair, chunk, chunks, column, tile)
        grad = kept_state(grads, pair, chunk, chunks, column, tile)
        if DECAY:
            through += tl.sum(grad.to(tl.float32) * state.to(tl.float32), 1)
        old, behind = factored(state, above), factored(grad, y)
        inter += dot(above, tl.trans(old[0]), tile) * old[1]
        known += dot(back, tl.trans(old[0]), tile) * old[1]
        outward += dot(y, tl.trans(behind[0]), tile) * behind[1]
    keys = read(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    queries = read(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    _, last, rate, into, out, ask, of_key, of_query = numbers(lines, pair, token, n, scale, tile)
    inside, at = r < n - token, pair.to(tl.int64) * n + token + r
    inter, known, outward = inter * ask[:, None], known * into[:, None], outward * out[:, None]
    old_asked, read_back, left = tl.sum(inter * queries, 1), tl.sum(known * keys, 1), tl.sum(outward * keys, 1)
    tl.store(dbeta + at, tl.load(dbeta + at, mask=inside, other=0.0) - read_back, mask=inside)
    outward -= known * rate[:, None]
    passed = old_asked - rate * read_back
    if DECAY:
        found = tl.cumsum(passed + tl.load(dg + at, mask=inside, other=0.0), 0, reverse=True)
        found += preceding(tl.cumsum(left, 0)) + tl.exp(last) * tl.sum(through, 0)
        tl.store(dg + at, found, mask=inside)
    if tile.NORM:  # lengths change nothing
        first = along + pair.to(tl.int64) * (2 * n) + token + r
        of_keys = tl.load(first, mask=inside, other=0.0) + left - rate * read_back
        of_queries = tl.load(first + n, mask=inside, other=0.0) + old_asked
        outward -= keys.to(tl.float32) * (of_keys * of_key * of_key)[:, None]
        inter -= queries.to(tl.float32) * (of_queries * of_query * of_query)[:, None]
    pairs = tl.load(square(asked, pair, chunk, chunks, tile))
    inter += dot(pairs, keys, tile)
    put(dq, inter, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    outward += dot(tl.trans(pairs), queries, tile)
    pairs = tl.load(square(changed, pair, chunk, chunks, tile))
    outward += dot(pairs, keys, tile)
    outward += dot(tl.trans(pairs), keys, tile)
    put(dk, outward, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
