"""mLSTM's Triton kernel: that of causal linear attention with decays, with another divisor; the rest is shared."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.tiles import dot, factored, load, put
from tilebook.kernels.linear_attention.kernels import (
    _UNSPECIALIZED,
    _decays,
    _grow,
    _load_state,
    _load_z,
    _seen,
    _store_state,
    _whose,
)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def memory_kernel(
    q, k, v, g, floor, init, o, den, final, g_b, g_h, g_s, heads, n, walk, scale, eps, tile, ONE: tl.constexpr
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
        more = tl.sum(keys.to(tl.float32) * tl.exp(rest)[:, None], 0)
        within, factor = tl.exp(c), factored(state, queries)
        acc = dot(queries, factor[0], tile) * (within * factor[1])[:, None]
        # Both sums are of rounded weights: where one token is all, its value comes out whatever its weight.
        a = (dot(queries, tl.trans(keys), tile) * _seen(c, tile, False)).to(values.dtype)
        acc += dot(a, values, tile)
        inside, at = r < n - token, pair.to(tl.int64) * n + token + r
        weight = (tl.sum(a.to(tl.float32), 1) + known) * scale
        least = tl.load(floor + at, mask=inside, other=1.0)
        acc *= (scale / (tl.maximum(tl.abs(weight), least) + eps))[:, None]
        if column == 0:
            tl.store(den + at, weight, mask=inside)
        put(o, acc, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        if not ONE:
            state, z = _grow(state, z, keys, values, more, tl.exp(rest), last, n, tile)
    if final.source is not None:
        _store_state(final, state, z, batch, head, part, column, tile)
