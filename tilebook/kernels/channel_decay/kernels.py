"""Triton kernels of decays by channel: h_t = diag(exp(g_t)) h_{t−1} + k_t v_tᵀ, o_t = scale · h_tᵀ q_t.

With c the running sum of a chunk's log-decays by channel, token i sees token j ≤ i by Σ_d q_id k_jd exp(c_id − c_jd).
That is no product of q and k, whatever each is multiplied by in advance, unless exp(−c) is, which has no end. But of
tokens i and j in different halves of 2, 4, 8, … tokens it is one of what either has to the middle between the halves,
where both exponents are at most 0; and any two tokens of a chunk lie in different halves of one such block. So each
level of halves is one product of the chunk's rows with themselves, queries in later halves and keys in earlier ones.

Sums of log-decays are written to memory before, so that those of middles are to be had by their address. One kernel
finds these weights, q e^c, k e^(c_last − c) and e^c_last; others need nothing more of q, k and decays.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.tiles import dot, preceding, put
from tilebook.kernels.channel_decay.tiles import decays, halved, in_halves, kept_of, state_slice, summed
from tilebook.kernels.delta_rule.tiles import begun, ended, factored, keep_state, kept_state, read, square, whose


@triton.jit(do_not_specialize=["heads", "n"])
def sums_kernel(g, sums, rests, heads, n, tile):
    """Sums of one chunk's log-decays up to each token, and where they are wanted those behind each, which 16 bits do
    not tell from a difference of the others."""
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token, column = pair % heads, pair // heads, chunk * tile.CHUNK, tl.program_id(2) * tile.SLICE
    d = column + tl.arange(0, tile.SLICE)
    at = (pair.to(tl.int64) * n + token) * tile.D + (r[:, None] * tile.D + d[None, :])
    inside = (r < n - token)[:, None] & (d < tile.D)[None, :]
    tl.store(sums + at, summed(g, batch, head, token, n, column, tile, 0), mask=inside)
    if rests is not None:
        tl.store(rests + at, summed(g, batch, head, token, n, column, tile, 1), mask=inside)


@triton.jit(do_not_specialize=["heads", "n"])
def pairs_kernel(q, k, sums, rests, asking, leaving, kept, scores, heads, n, scale, tile):
    """Of one chunk: what pairs of its tokens count for, to `scores`, and what it has to do with states."""
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    a = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    for column in tl.range(0, tile.D, tile.SLICE):
        queries = read(q, batch, head, token, n, column, tile.CHUNK, tile.D, tile.SLICE)
        keys = read(k, batch, head, token, n, column, tile.CHUNK, tile.D, tile.SLICE)
        c, rest, last = decays(sums, rests, pair, token, column, n, tile)
        put(asking, queries * (tl.exp2(c) * scale), batch, head, token, n, column, tile.CHUNK, tile.D, tile.SLICE)
        put(leaving, keys * tl.exp2(rest), batch, head, token, n, column, tile.CHUNK, tile.D, tile.SLICE)
        d = column + tl.arange(0, tile.SLICE)
        tl.store(kept + (pair.to(tl.int64) * chunks + chunk) * tile.D + d, tl.exp2(last), mask=d < tile.D)
        itself = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), 1)
        a += tl.where(r[:, None] == r[None, :], itself[:, None], 0.0)
        for level in tl.range(0, tile.LEVELS, num_stages=1):
            late, part = halved(c, sums, pair, token, column, level, n, tile)
            rows = (tl.where(late, queries, keys) * part).to(queries.dtype)
            a += tl.where(in_halves(level, tile), dot(rows, tl.trans(rows), tile), 0.0)
    a = tl.where(r[:, None] >= r[None, :], a * scale, 0.0)
    tl.store(square(scores, pair, chunk, chunks, tile), a.to(scores.dtype.element_ty))


@triton.jit(do_not_specialize=["heads", "n", "walk", "every"])
def states_kernel(
    x, y, kept, init, starts, states, totals, final, heads, n, walk, every, tile,
    STORE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States along a walk of `walk` chunks: x is `leaving`, y is v; backwards in time x is `asking`, y do.

    STORE: begins with `init`, or where there are several walks with `starts`, writes the state in front of every
    `every` chunks (backwards behind each) to `states`, and the last of all to `final`. Else begins with nothing, and
    writes the last alone to `states`, and what is kept over the walk to `totals`.
    """
    column, head, batch, pair = whose(heads, tile)
    part, parts, chunks = tl.program_id(1), tl.num_programs(1), tl.cdiv(n, tile.CHUNK)
    first, end = part * walk, tl.minimum(part * walk + walk, chunks)
    if starts is None:
        state = begun(init, batch, head, column, tile)
    else:
        state = kept_state(starts, pair, part, parts, column, tile)
    total = tl.full([tile.WIDE], 1.0, tl.float32)
    for step in tl.range(0, end - first):
        chunk = end - 1 - step if REVERSE else first + step
        token = chunk * tile.CHUNK
        if STORE:
            at_edge = chunk % every == 0
            if at_edge:
                keep_state(states, state, pair, chunk // every, tl.cdiv(chunks, every), column, tile)
        rows = read(x, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
        values = read(y, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        some = kept_of(kept, pair.to(tl.int64) * chunks + chunk, tile)
        state = state * some[:, None]
        state += dot(tl.trans(rows), values, tile)
        total *= some
    if not STORE:
        keep_state(states, state, pair, part, parts, column, tile)
        if column == 0:
            d = tl.arange(0, tile.WIDE)
            tl.store(totals + (pair.to(tl.int64) * parts + part) * tile.D + d, total, mask=d < tile.D)
    elif final.source is not None:
        edge = 0 if REVERSE else parts - 1
        if part == edge:
            ended(final, state, batch, head, column, tile)


@triton.jit(do_not_specialize=["heads", "parts"])
def scan_kernel(
    states, totals, init, final, heads, parts, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What each of `parts` walks adds, in `states`, becomes what each of them begins with."""
    pair = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d, v, inside = at % D, at // D, at < SIZE
    given = (pair // heads).to(tl.int64) * init.b + (pair % heads).to(tl.int64) * init.h
    state = tl.zeros([BLOCK], tl.float32)
    if init.source is not None:
        state += tl.load(init.source + given + d * init.d + v * init.v, mask=inside, other=0.0)
    for step in tl.range(0, parts):
        place = pair.to(tl.int64) * parts + (parts - 1 - step if REVERSE else step)
        added = tl.load(states + place * SIZE + at, mask=inside, other=0.0)
        some = tl.load(totals + place * D + d)
        tl.store(states + place * SIZE + at, state, mask=inside)
        state = state * some + added
    if final.source is not None:
        given = (pair // heads).to(tl.int64) * final.b + (pair % heads).to(tl.int64) * final.h
        tl.store(final.source + given + d * final.d + v * final.v, state, mask=inside)


@triton.jit(do_not_specialize=["heads", "n", "walk"])
def outputs_kernel(
    x, y, leaving, kept, scores, init, starts, final, o, heads, n, walk, tile, ONE: tl.constexpr, TURNED: tl.constexpr
):
    """o = x h + a y along a walk of `walk` chunks, ONE or more, x being `asking`, y v; the last state to `final`.

    TURNED: dv, of aᵀ, x being `leaving`, y do, and the states those of the gradients behind chunks, of which each is
    there already.
    """
    column, head, batch, pair = whose(heads, tile)
    part, parts, chunks = tl.program_id(1), tl.num_programs(1), tl.cdiv(n, tile.CHUNK)
    first, end = part * walk, tl.minimum(part * walk + walk, chunks)
    if starts is None:
        state = begun(init, batch, head, column, tile)
    else:
        state = kept_state(starts, pair, part, parts, column, tile)
        if not ONE:
            state = state.to(tl.float32)
    for chunk in tl.range(first, end):
        token = chunk * tile.CHUNK
        rows = read(x, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
        values = read(y, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        old = factored(state, rows)
        acc = dot(rows, old[0], tile) * old[1]
        a = tl.load(square(scores, pair, chunk, chunks, tile))
        acc += dot(tl.trans(a) if TURNED else a, values, tile)
        put(o, acc, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        if not ONE:
            keys = read(leaving, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
            state = state * kept_of(kept, pair.to(tl.int64) * chunks + chunk, tile)[:, None]
            state += dot(tl.trans(keys), values, tile)
    if final.source is not None:
        ended(final, state.to(tl.float32), batch, head, column, tile)


@triton.jit(do_not_specialize=["heads", "n"])
def gradients_kernel(
    do, q, k, v, sums, rests, states, grads, dq, dk, dg, heads, n, scale, tile, DECAYED: tl.constexpr
):  # fmt: skip
    """Some channels of the gradients of one chunk's queries, keys and log-decays, of the state in front of it and the
    gradient of the one behind it. DECAYED: dg is wanted.

    The gradient of a log-decay is the sum of all that passes from before a token to it or to one after it: what later
    queries ask of the state, and what earlier keys leave it. What pairs add behind both of them must be what they take
    away there: of both the same rounded factors are multiplied.
    """
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token, chunks = pair % heads, pair // heads, chunk * tile.CHUNK, tl.num_programs(1)
    first = tl.program_id(2) * tile.SLICE
    asked = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    turned = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    of_queries = tl.zeros([tile.CHUNK, tile.SLICE], tl.float32)
    of_keys = tl.zeros([tile.CHUNK, tile.SLICE], tl.float32)
    through = tl.zeros([tile.SLICE], tl.float32)
    for column in tl.range(0, tile.V, tile.BLOCK_V):
        above = read(do, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        values = read(v, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        state = state_slice(states, pair, chunk, chunks, first, column, tile)
        grad = state_slice(grads, pair, chunk, chunks, first, column, tile)
        if DECAYED:
            through += tl.sum(grad.to(tl.float32) * state.to(tl.float32), 0)
        asked += dot(above, tl.trans(values), tile)
        turned += dot(values, tl.trans(above), tile)
        old, onward = factored(state, above), factored(grad, values)
        of_queries += dot(above, old[0], tile) * old[1]
        of_keys += dot(values, onward[0], tile) * onward[1]
    queries = read(q, batch, head, token, n, first, tile.CHUNK, tile.D, tile.SLICE)
    keys = read(k, batch, head, token, n, first, tile.CHUNK, tile.D, tile.SLICE)
    c, rest, last = decays(sums, rests, pair, token, first, n, tile)
    of_queries *= tl.exp2(c) * scale
    of_keys *= tl.exp2(rest)
    passed, total = of_queries * queries, preceding(tl.cumsum(of_keys * keys, 0)) + (tl.exp2(last) * through)[None, :]
    asked = tl.where(r[:, None] >= r[None, :], asked, turned) * scale  # the later of two tokens is the one that asks
    itself = tl.sum(tl.where(r[:, None] == r[None, :], asked, 0.0), 1)
    of_queries += itself[:, None] * keys
    of_keys += itself[:, None] * queries
    asked = asked.to(queries.dtype)
    for level in tl.range(0, tile.LEVELS, num_stages=1):
        late, part = halved(c, sums, pair, token, first, level, n, tile)
        rows = (tl.where(late, queries, keys) * part).to(queries.dtype)
        found = dot(tl.where(in_halves(level, tile), asked, 0.0), rows, tile)
        if DECAYED:
            passed += tl.where(late, found, -found) * rows
        found *= part
        of_queries += tl.where(late, found, 0.0)
        of_keys += tl.where(late, 0.0, found)
    put(dq, of_queries, batch, head, token, n, first, tile.CHUNK, tile.D, tile.SLICE)
    put(dk, of_keys, batch, head, token, n, first, tile.CHUNK, tile.D, tile.SLICE)
    if DECAYED:
        found = tl.cumsum(passed, 0, reverse=True) + total
        put(dg, found, batch, head, token, n, first, tile.CHUNK, tile.D, tile.SLICE)
