"""Linear attention's Triton kernels: h_t = exp(g_t) h_{t−1} + k_t v_tᵀ, o_t = scale · h_tᵀ q_t, by chunks of tokens.

Inside a chunk they are matrix products, between chunks a state [D, V] in fp32. A program walks over some chunks with
its state in registers. With c the running sum of a chunk's log-decays, token i sees token j ≤ i times exp(c_i − c_j)
and the state before the chunk times exp(c_i), and counts in the state behind the chunk for exp(c_last − c_i).

States lie in memory transposed, [V, D]. Where NORM, the row behind the last is z, the sum of the keys alone, by which
outputs are divided: a column of v that is 1 throughout.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.tiles import dot, factored, load, mapped, preceding, pulled_back, put

LEAST = tl.constexpr(-100.0)
"""Log-decays below count as this: exp of it is nothing in fp32, and sums of it still tell neighbours apart."""

_UNSPECIALIZED = ["g_b", "g_h", "g_s", "heads", "n", "walk"]


class States(NamedTuple):
    """States by batch, head and place, with the steps of each, and those of their two axes."""

    source: Any
    b: Any
    h: Any
    p: Any
    d: Any
    v: Any


class Gradients(NamedTuple):
    """Rows of the gradients of q, k and v."""

    q: Any
    k: Any
    v: Any


class Tile(NamedTuple):
    """Constants. D, V: the widths; WIDE, BLOCK_V: the power of two above D, columns of v that a program takes.

    APART: states must not be sums that products are added to in place, where Triton 3.6 fails to compile reading them.
    """

    CHUNK: Any
    D: Any
    V: Any
    WIDE: Any
    BLOCK_V: Any
    DECAY: Any
    NORM: Any
    EXACT: Any
    APART: Any
    MAP: Any


@triton.jit
def _features(x, token, n, tile):
    """φ of the rows of x. 0 of what is no token: without that Triton makes features anew for each product of them."""
    r = tl.arange(0, tile.CHUNK)
    return tl.where((r < n - token)[:, None], mapped(x, tile, False), 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_s", "heads", "n"])
def decays_kernel(g, sums, rests, g_b, g_h, g_s, heads, n, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Sums of each chunk's log-decays: up to each token, and behind it."""
    pair = tl.program_id(0)
    base = g + (pair // heads).to(tl.int64) * g_b + (pair % heads).to(tl.int64) * g_h
    r = tl.arange(0, CHUNK)
    token = (tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS))[:, None] * CHUNK + r[None, :]
    each = _each(base, token, n, g_s, token < n)
    after = _each(base, token + 1, n, g_s, (token + 1 < n) & (r + 1 < CHUNK)[None, :])
    to = pair.to(tl.int64) * n + token
    tl.store(sums + to, tl.cumsum(each, 1), mask=token < n)
    tl.store(rests + to, tl.cumsum(after, 1, reverse=True), mask=token < n)


@triton.jit
def _each(g, token, n, step, there):
    """Log-decays of tokens, 0 of those that are not `there`. g: of the head."""
    return tl.maximum(tl.load(g + token.to(tl.int64) * step, mask=there, other=0.0).to(tl.float32), LEAST)


@triton.jit
def _decays(g, rests, batch, head, g_b, g_h, g_s, token, n, tile):
    """Sums of a chunk's log-decays: up to each token, behind each token, and of all. With `rests` they are there: g is
    the first of them.

    fp32 adds those behind up from the end: what is left of a difference of large sums is their rounding, which 16 bits
    do not see.
    """
    r = tl.arange(0, tile.CHUNK)
    start = batch.to(tl.int64) * g_b + head.to(tl.int64) * g_h
    if not tile.DECAY:
        sums = tl.zeros([tile.CHUNK], tl.float32)
        rest, last = sums, 0.0
    elif rests is None:
        sums = tl.cumsum(_each(g + start, token + r, n, g_s, r < n - token), 0)
        last = tl.min(sums, 0)
        rest = last - sums
        if tile.EXACT:
            after = _each(g + start, token + r + 1, n, g_s, (r + 1 < n - token) & (r + 1 < tile.CHUNK))
            rest = tl.cumsum(after, 0, reverse=True)
    else:
        at, inside = start + token + r, r < n - token
        last = tl.load(g + start + tl.minimum(token + tile.CHUNK, n) - 1)
        sums = tl.where(inside, tl.load(g + at, mask=inside, other=0.0), last)
        rest = tl.load(rests + at, mask=inside, other=0.0)
    return sums, rest, last


@triton.jit
def _seen(sums, tile, TURNED: tl.constexpr):
    """exp(c_i − c_j) where j ≤ i, else 0: [i, j], or where TURNED [j, i]."""
    r = tl.arange(0, tile.CHUNK)
    if TURNED:
        seen, apart = r[:, None] <= r[None, :], sums[None, :] - sums[:, None]
    else:
        seen, apart = r[:, None] >= r[None, :], sums[:, None] - sums[None, :]
    return tl.exp(tl.where(seen, apart if tile.DECAY else 0.0, -float("inf")))


@triton.jit
def _offsets(states, batch, head, place):
    base = batch.to(tl.int64) * states.b + head.to(tl.int64) * states.h
    return states.source + base + place.to(tl.int64) * states.p


@triton.jit
def _load_state(states, batch, head, place, column, tile):
    """A state [WIDE, BLOCK_V], as it is kept; zeros in fp32 where there is none."""
    d, v = tl.arange(0, tile.WIDE), column + tl.arange(0, tile.BLOCK_V)
    if states.source is None:
        state = tl.zeros([tile.WIDE, tile.BLOCK_V], tl.float32)
    else:
        at = _offsets(states, batch, head, place) + d[:, None] * states.d + v[None, :] * states.v
        state = tl.load(at, mask=(d < tile.D)[:, None] & (v < tile.V)[None, :], other=0.0)
    return state


@triton.jit
def _load_z(states, batch, head, place, tile):
    """Its last column z [WIDE], in fp32; zeros where there is none."""
    d = tl.arange(0, tile.WIDE)
    z = tl.zeros([tile.WIDE], tl.float32)
    if tile.NORM and states.source is not None:
        z += tl.load(
            _offsets(states, batch, head, place) + d * states.d + tile.V * states.v, mask=d < tile.D, other=0.0
        )
    return z


@triton.jit
def _store_state(states, state, z, batch, head, place, column, tile):
    d, v = tl.arange(0, tile.WIDE), column + tl.arange(0, tile.BLOCK_V)
    base = _offsets(states, batch, head, place)
    inside = (d < tile.D)[:, None] & (v < tile.V)[None, :]
    tl.store(
        base + d[:, None] * states.d + v[None, :] * states.v, state.to(states.source.dtype.element_ty), mask=inside
    )
    if tile.NORM and column == 0:
        last = base + d * states.d + tile.V * states.v
        tl.store(last, z.to(states.source.dtype.element_ty), mask=d < tile.D)


@triton.jit
def _grow(state, z, x, y, more, factor, last, n, tile):
    """The state behind a chunk: exp(last) · state + xᵀ (factor · y), and exp(last) · z + `more`."""
    if tile.DECAY:
        kept = tl.exp(last)
        state, z = state * kept, z * kept
    elif tile.APART:
        state = state * tl.minimum(n, 1).to(tl.float32)
    if tile.DECAY:  # on Hopper a factor in registers, which else would have to go back to shared memory
        state += dot((tl.trans(x) * factor[None, :]).to(x.dtype), y, tile)
    else:
        state += dot(tl.trans(x), (y * factor[:, None]).to(x.dtype), tile)
    if tile.NORM:
        z += more
    return state, z


@triton.jit
def _whose(heads, tile):
    """(first column of v, head, batch) of a program, and which pair of batch and head that is."""
    tiles = tl.cdiv(tile.V, tile.BLOCK_V)
    program = tl.program_id(0)
    pair = program // tiles
    return program % tiles * tile.BLOCK_V, pair % heads, pair // heads, pair


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "every"])
def states_kernel(
    x, y, weight, g, rests, init, out, totals, final, g_b, g_h, g_s, heads, n, walk, every, scale,
    tile, STORE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States along a walk of `walk` chunks: x is k, y is v; backwards in time x is q, y do, and states are gradients.

    STORE: begins with `init`, writes the state in front of every `every` chunks (backwards behind each) to `out`, and
    the last of all to `final`. Else begins with nothing, and writes the last alone to `out`, its decay to `totals`.
    """
    column, head, batch, pair = _whose(heads, tile)
    part, chunks = tl.program_id(1), tl.cdiv(n, tile.CHUNK)
    first, end = part * walk, tl.minimum(part * walk + walk, chunks)
    r, total = tl.arange(0, tile.CHUNK), 0.0
    state, z = _load_state(init, batch, head, part, column, tile), _load_z(init, batch, head, part, tile)
    state = state.to(tl.float32)
    for step in tl.range(0, end - first):
        chunk = end - 1 - step if REVERSE else first + step
        token = chunk * tile.CHUNK
        if STORE:
            at_edge = chunk % every == 0
            if at_edge:
                _store_state(out, state, z, batch, head, chunk // every, column, tile)
        rows = load(x, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
        values = load(y, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        c, rest, last = _decays(g, rests, batch, head, g_b, g_h, g_s, token, n, tile)
        factor, more = tl.exp(c) * scale if REVERSE else tl.exp(rest), 0.0
        if tile.MAP != "none":
            rows = _features(rows, token, n, tile)
        if tile.NORM:
            some = 1.0
            if weight is not None:
                some = tl.load(weight + pair.to(tl.int64) * n + token + r, mask=r < n - token, other=0.0)
            more = tl.sum(rows.to(tl.float32) * (factor * some)[:, None], 0)
        state, z = _grow(state, z, rows, values, more, factor, last, n, tile)
        total += last
    if not STORE:
        _store_state(out, state, z, batch, head, part, column, tile)
        if column == 0:
            tl.store(totals + pair.to(tl.int64) * tl.num_programs(1) + part, total)
    elif final.source is not None:
        edge = 0 if REVERSE else tl.num_programs(1) - 1
        if part == edge:
            _store_state(final, state, z, batch, head, part * 0, column, tile)


@triton.jit(do_not_specialize=["heads", "parts"])
def scan_kernel(
    out, totals, init, final, heads, parts, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What each of `parts` walks adds, in `out`, becomes what each of them begins with."""
    pair = tl.program_id(0)
    head, batch, part = pair % heads, pair // heads, pair * 0
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d, v, inside = at % D, at // D, at < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    if init.source is not None:
        state += tl.load(_offsets(init, batch, head, part) + d * init.d + v * init.v, mask=inside, other=0.0)
    for step in tl.range(0, parts):
        part = parts - 1 - step if REVERSE else step
        place = _offsets(out, batch, head, part) + d * out.d + v * out.v
        added = tl.load(place, mask=inside, other=0.0)
        kept = tl.exp(tl.load(totals + pair.to(tl.int64) * parts + part))
        tl.store(place, state, mask=inside)
        state = state * kept + added
    if final.source is not None:
        tl.store(_offsets(final, batch, head, pair * 0) + d * final.d + v * final.v, state, mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
    q, k, v, g, rests, init, o, den, final, g_b, g_h, g_s, heads, n, walk, scale, eps, tile, ONE: tl.constexpr
):
    """o along a walk that begins with its state in `init`, and is ONE chunk long or more; the last state to `final`.

    Where NORM o is divided by eps + den, den_i = scale · Σ_j (q_i · k_j).
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
        if tile.MAP != "none":
            queries = _features(queries, token, n, tile)
        c, rest, last = _decays(g, rests, batch, head, g_b, g_h, g_s, token, n, tile)
        known, more = 0.0, 0.0
        if tile.NORM:  # before the products, so that no rows wait for their end in registers
            known = tl.sum(queries.to(tl.float32) * z[None, :], 1) * tl.exp(c)
        within, factor = tl.exp(c), factored(state, queries)
        acc = dot(queries, factor[0], tile) * (within * factor[1])[:, None]
        if tile.MAP != "none":
            keys = _features(keys, token, n, tile)
        if tile.NORM:
            more = tl.sum(keys.to(tl.float32) * tl.exp(rest)[:, None], 0)
        if tile.MAP != "none" and not tile.DECAY:
            a = tl.where(r[:, None] >= r[None, :], dot(queries, tl.trans(keys), tile), 0.0)
        else:
            a = dot(queries, tl.trans(keys), tile) * _seen(c, tile, False)
        acc += dot(a.to(values.dtype), values, tile)
        if tile.NORM:
            weight = (tl.sum(a, 1) + known) * scale
            acc = acc / (weight + eps)[:, None]
            if column == 0:
                tl.store(den + pair.to(tl.int64) * n + token + r, weight, mask=r < n - token)
        put(o, acc * scale, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        if not ONE:
            state, z = _grow(state, z, keys, values, more, tl.exp(rest), last, n, tile)
    if final.source is not None:
        _store_state(final, state, z, batch, head, part, column, tile)


@triton.jit(do_not_specialize=["g_b", "g_h", "g_s", "heads", "n"])
def backward_kernel(
    do,
    q,
    k,
    v,
    weight,
    g,
    rests,
    states,
    grads,
    made,
    dg,
    g_b,
    g_h,
    g_s,
    heads,
    n,
    scale,
    tile,
    DECAYED: tl.constexpr,
):
    """Gradients of one chunk, of the state in front of it and the gradient of the one behind it.

    made: dq, dk and dv. weight: of z in each row's gradient, where NORM. DECAYED: dg is wanted. With P_ij = do_i · v_j
    times what q_i · k_j counts for, dg_t is the sum of all that passes from before t to t or after it: of P over
    j < t ≤ i, of tokens and states likewise.
    """
    pair, chunk, r = tl.program_id(0), tl.program_id(1), tl.arange(0, tile.CHUNK)
    head, batch, token = pair % heads, pair // heads, chunk * tile.CHUNK
    c, rest, last = _decays(g, rests, batch, head, g_b, g_h, g_s, token, n, tile)
    within, behind = tl.exp(c) * scale, tl.exp(rest)
    queries = load(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
    keys = load(k, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
    if tile.MAP != "none":
        queries, keys = _features(queries, token, n, tile), _features(keys, token, n, tile)
    # Weights of pairs stand the other way round, [j, i], and so does what dq is added up in, [D, i]: on Hopper Triton
    # 3.4 to 3.7.0 makes wrong numbers of products with a factor that is another product, transposed.
    s = (dot(keys, tl.trans(queries), tile) * (_seen(c, tile, True) * scale)).to(queries.dtype)
    a = tl.zeros([tile.CHUNK, tile.CHUNK], tl.float32)
    inter = tl.zeros([tile.WIDE, tile.CHUNK], tl.float32)
    outward = tl.zeros([tile.CHUNK, tile.WIDE], tl.float32)
    through = tl.zeros([tile.WIDE], tl.float32)
    for column in tl.range(0, tile.V, tile.BLOCK_V):
        values = load(v, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        above = load(do, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        state = _load_state(states, batch, head, chunk, column, tile)
        grad = _load_state(grads, batch, head, chunk, column, tile)
        if DECAYED:
            through += tl.sum(grad.to(tl.float32) * state.to(tl.float32), 1)
        a += dot(values, tl.trans(above), tile)
        old, gradient = factored(state, above), factored(grad, keys)
        inter += dot(old[0], tl.trans(above), tile) * old[1]
        outward += dot(values, tl.trans(gradient[0]), tile) * gradient[1]
        onward = dot(keys, gradient[0], tile) * (behind * gradient[1])[:, None]
        onward += dot(s, above, tile)
        put(made.v, onward, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
    if tile.NORM:
        some = tl.load(weight + pair.to(tl.int64) * n + token + r, mask=r < n - token, other=0.0)
        z, dz = _load_z(states, batch, head, chunk, tile), _load_z(grads, batch, head, chunk, tile)
        a += some[None, :]
        inter += z[:, None] * some[None, :]
        outward += dz[None, :]
        through += dz * z
    inter, outward = inter * within[None, :], outward * behind[:, None]
    if DECAYED:
        p = tl.where(r[:, None] < r[None, :], s * a, 0.0)
        passed, left = tl.sum(p, 0) - tl.sum(p, 1) + tl.sum(inter * tl.trans(queries), 0), tl.sum(outward * keys, 1)
        found = tl.cumsum(passed, 0, reverse=True) + preceding(tl.cumsum(left, 0)) + tl.exp(last) * tl.sum(through, 0)
        tl.store(dg + pair.to(tl.int64) * n + token + r, found, mask=r < n - token)
    ds = (a * (_seen(c, tile, True) * scale)).to(keys.dtype)
    outward += dot(ds, queries, tile)
    if tile.MAP != "none":
        outward = pulled_back(keys, outward, tile, False)
    put(made.k, outward, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
    inter += dot(tl.trans(keys), ds, tile)
    if tile.MAP != "none":
        inter = pulled_back(tl.trans(queries), inter, tile, True)
    put(made.q, tl.trans(inter), batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
