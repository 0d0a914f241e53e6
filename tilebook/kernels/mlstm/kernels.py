"""mLSTM's Triton kernels: those of normalized causal linear attention with decays, but for what tokens write.

A token's weight is multiplied by e^(log_input), at most 1, before it is rounded: k or v in its place would be rounded
once more, which is much of a product of q and k that is nearly 0. Walks that find states have it in what they are told
of decays behind tokens.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.tiles import dot, factored, load, preceding, put
from tilebook.kernels.linear_attention.kernels import (
    _UNSPECIALIZED,
    _decays,
    _each,
    _grow,
    _load_state,
    _load_z,
    _store_state,
    _whose,
)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_s", "heads", "n"])
def sums_kernel(g, log_input, sums, rests, g_b, g_h, g_s, heads, n, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums of each chunk's log-decays: up to each token, and behind it, with what it writes."""
    pair = tl.program_id(0)
    base = g + (pair // heads).to(tl.int64) * g_b + (pair % heads).to(tl.int64) * g_h
    r = tl.arange(0, CHUNK)
    token = (tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS))[:, None] * CHUNK + r[None, :]
    each = _each(base, token, n, g_s, token < n)
    after = _each(base, token + 1, n, g_s, (token + 1 < n) & (r + 1 < CHUNK)[None, :])
    at = pair.to(tl.int64) * n + token
    written = tl.load(log_input + at, mask=token < n, other=0.0)
    tl.store(sums + at, tl.cumsum(each, 1), mask=token < n)
    tl.store(rests + at, tl.cumsum(after, 1, reverse=True) + written, mask=token < n)


@triton.jit
def _weights(c, written, tile, TURNED: tl.constexpr):
    """exp(c_i − c_j + log_input_j) where j ≤ i, else 0: [i, j], or where TURNED [j, i]."""
    r, start = tl.arange(0, tile.CHUNK), c - written
    if TURNED:
        seen, apart = r[:, None] <= r[None, :], c[None, :] - start[:, None]
    else:
        seen, apart = r[:, None] >= r[None, :], c[:, None] - start[None, :]
    return tl.exp(tl.where(seen, apart, -float("inf")))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def memory_kernel(
    q,
    k,
    v,
    g,
    log_input,
    floor,
    init,
    o,
    den,
    final,
    g_b,
    g_h,
    g_s,
    heads,
    n,
    walk,
    scale,
    eps,
    tile,
    ONE: tl.constexpr,
):
    """o along a walk that begins with its state in `init`, and is ONE chunk long or more; the last state to `final`.

    o is divided by eps + max(|den|, floor), den_i = scale · Σ_j (q_i · k_j), what lies before the walk included.
    """
    column, head, batch, pair = _whose(heads, tile)
    part, chunks, r = tl.program_id(1), tl.cdiv(n, tile.CHUNK), tl.arange(0, tile.CHUNK)
    first, end = part * walk, tl.minimum(part * walk + walk, chunks)
    state, z = _load_state(init, batch, head, part, column, tile), _load_z(init, batch, head, part, tile)
    if not ONE:
        state = state.to(tl.float32)
    for chunk in tl.range(first, end):
        token = chunk * tile.CHUNK
        queries = load(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
        keys = load(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
        values = load(v, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        c, rest, last = _decays(g, None, batch, head, g_b, g_h, g_s, token, n, tile)
        # Before the products, so that no rows wait for their end in registers.
        known = tl.sum(queries.to(tl.float32) * z[None, :], 1) * tl.exp(c)
        inside, at = r < n - token, pair.to(tl.int64) * n + token + r
        written = tl.load(log_input + at, mask=inside, other=-float("inf"))
        behind = tl.exp(rest + written)
        more = tl.sum(keys.to(tl.float32) * behind[:, None], 0)
        within, factor = tl.exp(c), factored(state, queries)
        acc = dot(queries, factor[0], tile) * (within * factor[1])[:, None]
        # Both sums are of rounded weights: where one token is all, its value comes out whatever its weight.
        a = (dot(queries, tl.trans(keys), tile) * _weights(c, written, tile, False)).to(values.dtype)
        acc += dot(a, values, tile)
        weight = (tl.sum(a.to(tl.float32), 1) + known) * scale
        least = tl.load(floor + at, mask=inside, other=1.0)
        acc *= (scale / (tl.maximum(tl.abs(weight), least) + eps))[:, None]
        if column == 0:
            tl.store(den + at, weight, mask=inside)
        put(o, acc, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        if not ONE:
            state, z = _grow(state, z, keys, values, more, behind, last, n, tile)
    if final.source is not None:
        _store_state(final, state, z, batch, head, part, column, tile)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_s", "heads", "n"])
def back_kernel(
    do,
    q,
    k,
    v,
    weight,
    g,
    rests,
    log_input,
    states,
    grads,
    made,
    dg,
    dlog_input,
    g_b,
    g_h,
    g_s,
    heads,
    n,
    scale,
    tile,
):
    """Gradients of one chunk, of the state in front of it and the gradient of the one behind it.

    made: dq, dk and dv. weight: the gradient of each row's sum of weights. As in linear attention's kernel, pairs stand
    as [j, i], and what dq is added up in as [D, i].
    """
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token = pair % heads, pair // heads, chunk * tile.CHUNK
    c, rest, last = _decays(g, rests, batch, head, g_b, g_h, g_s, token, n, tile)
    within, behind = tl.exp(c) * scale, tl.exp(rest)
    queries = load(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
    keys = load(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
    inside, at = r < n - token, pair.to(tl.int64) * n + token + r
    written = tl.load(log_input + at, mask=inside, other=-float("inf"))
    s = (dot(keys, tl.trans(queries), tile) * (_weights(c, written, tile, True) * scale)).to(queries.dtype)
    a = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    inter = tl.zeros([tile.WIDE, tile.CHUNK], tl.float32)
    outward = tl.zeros([tile.CHUNK, tile.WIDE], tl.float32)
    through = tl.zeros([tile.WIDE], tl.float32)
    for column in tl.range(0, tile.V, tile.BLOCK_V):
        values = load(v, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        above = load(do, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        state = _load_state(states, batch, head, chunk, column, tile)
        grad = _load_state(grads, batch, head, chunk, column, tile)
        through += tl.sum(grad.to(tl.float32) * state.to(tl.float32), 1)
        a += dot(values, tl.trans(above), tile)
        old, gradient = factored(state, above), factored(grad, keys)
        inter += dot(old[0], tl.trans(above), tile) * old[1]
        outward += dot(values, tl.trans(gradient[0]), tile) * gradient[1]
        onward = dot(keys, gradient[0], tile) * (behind * gradient[1])[:, None]
        onward += dot(s, above, tile)
        put(made.v, onward, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
    some = tl.load(weight + at, mask=inside, other=0.0)
    z, dz = _load_z(states, batch, head, chunk, tile), _load_z(grads, batch, head, chunk, tile)
    a += some[None, :]
    inter += z[:, None] * some[None, :]
    outward += dz[None, :]
    through += dz * z
    inter, outward = inter * within[None, :], outward * behind[:, None]
    p, left = s * a, tl.sum(outward * keys, 1)
    tl.store(dlog_input + at, tl.sum(p, 1) + left, mask=inside)
    p = tl.where(r[:, None] < r[None, :], p, 0.0)
    passed = tl.sum(p, 0) - tl.sum(p, 1) + tl.sum(inter * tl.trans(queries), 0)
    found = tl.cumsum(passed, 0, reverse=True) + preceding(tl.cumsum(left, 0)) + tl.exp(last) * tl.sum(through, 0)
    tl.store(dg + at, found, mask=inside)
    ds = (a * (_weights(c, written, tile, True) * scale)).to(keys.dtype)
    outward += dot(ds, queries, tile)
    put(made.k, outward, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    inter += dot(tl.trans(keys), ds, tile)
    put(made.q, tl.trans(inter), batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
