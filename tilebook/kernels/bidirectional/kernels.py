"""Linear attention without an order of tokens: o_i = Σ_j (φ(q_i) · φ(k_j)) v_j / (eps + Σ_j φ(q_i) · φ(k_j)).

Keys add to a state [F, V], which queries read: two passes forward, and backward the same over gradients. Features are
made where rows are loaded and never reach memory. A state lies in memory transposed, [V + 2, F]: behind the columns of
v comes z, the sum of φ(k), and a row that only Performer's features have, `top`: φ(k) is divided by e^top, the largest
of each feature over all keys, and φ(q) is multiplied by it and divided by the largest of the row. So all lie in 0 … 1,
whatever the lengths of rows, and nothing of it is left in o.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tilebook.kernels.bidirectional.form import HIDDEN
from tilebook.kernels.bidirectional.tiles import dot, factored, load, mapped, pulled_back, put

_HIDDEN = tl.constexpr(HIDDEN)
_FP16_MOST = tl.constexpr(65504.0)

_UNSPECIALIZED = ["heads", "n", "m_b", "m_s"]


class Tile(NamedTuple):
    """Constants. D, V, F: the widths of rows, values and features; WIDE, WIDE_F: the powers of two above D and F."""

    CHUNK: Any
    D: Any
    V: Any
    F: Any
    WIDE: Any
    WIDE_F: Any
    BLOCK_V: Any
    MAP: Any
    EXACT: Any


@triton.jit
def _whose(heads, tile, APART: tl.constexpr):
    """(first column of v, head, batch) of a program; where not APART, a program has all columns."""
    tiles = tl.cdiv(tile.V, tile.BLOCK_V) if APART else 1
    program = tl.program_id(0)
    pair = program // tiles
    return program % tiles * tile.BLOCK_V, pair % heads, pair // heads, pair


@triton.jit
def _seen(mask, batch, token, n, m_b, m_s, tile):
    """Logarithms of what keys count for: −infinity where they are hidden, or none are."""
    r = tl.arange(0, tile.CHUNK)
    weight = tl.where(r < n - token, 0.0, -float("inf"))
    if mask is not None:
        at = mask + batch.to(tl.int64) * m_b + (token + r).to(tl.int64) * m_s
        found = tl.load(at, mask=r < n - token, other=0.0)
        if mask.dtype.element_ty == tl.int1:
            weight = tl.where(found, -float("inf"), weight)
        else:
            weight = tl.where(found.to(tl.float32) > _HIDDEN, weight + found.to(tl.float32), -float("inf"))
    return weight


@triton.jit
def _omega(omega, part: tl.constexpr, tile, TURNED: tl.constexpr):
    """Performer's directions: [WIDE, WIDE_F], or where TURNED [WIDE_F, WIDE]. Part 1 is what rounding part 0 left."""
    f, d = tl.arange(0, tile.WIDE_F), tl.arange(0, tile.WIDE)
    base = omega + part * tile.F * tile.D
    if TURNED:
        found = tl.load(
            base + f[:, None] * tile.D + d[None, :], mask=(f[:, None] < tile.F) & (d[None, :] < tile.D), other=0.0
        )
    else:
        found = tl.load(
            base + f[None, :] * tile.D + d[:, None], mask=(f[None, :] < tile.F) & (d[:, None] < tile.D), other=0.0
        )
    return found


@triton.jit
def _logarithms(x, omega, scale, tile, TURNED: tl.constexpr):
    """ω · x − scale |x|² / 2 of Performer's features; −infinity of what is none."""
    axis: tl.constexpr = 0 if TURNED else 1
    f = tl.arange(0, tile.WIDE_F)
    length = tl.sum(x.to(tl.float32) * x.to(tl.float32), axis) * (0.5 * scale)
    if TURNED:
        found = dot(_omega(omega, 0, tile, True), x, tile)
        if not tile.EXACT:
            found += dot(_omega(omega, 1, tile, True), x, tile)
        found = tl.where(f[:, None] < tile.F, found - length[None, :], -float("inf"))
    else:
        found = dot(x, _omega(omega, 0, tile, False), tile)
        if not tile.EXACT:
            found += dot(x, _omega(omega, 1, tile, False), tile)
        found = tl.where(f[None, :] < tile.F, found - length[:, None], -float("inf"))
    return found


@triton.jit
def _finite(x):
    """Of maxima: 0 where there was nothing."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _of_query(x, omega, scale, top, tile, TURNED: tl.constexpr):
    """φ(q) in fp32: [CHUNK, WIDE_F], or where TURNED the other way round."""
    if tile.MAP == "performer":
        found = _logarithms(x, omega, scale, tile, TURNED)
        found += top[:, None] if TURNED else top[None, :]
        axis: tl.constexpr = 0 if TURNED else 1
        most = _finite(tl.max(found, axis))
        found = tl.exp(found - (most[None, :] if TURNED else most[:, None]))
    else:
        found = mapped(x, tile, TURNED)
    return found


@triton.jit
def _of_key(x, omega, scale, weight, top, tile):
    """φ(k) in fp32 [CHUNK, WIDE_F], times what the keys count for."""
    if tile.MAP == "performer":
        found = tl.exp(_logarithms(x, omega, scale, tile, False) + weight[:, None] - _finite(top)[None, :])
    else:
        found = mapped(x, tile, False) * tl.exp(weight)[:, None]
    return found


@triton.jit
def _divided(values, divisor, room):
    """Gradients of o, of numerators. Rows that see nothing have next to nothing for a divisor.

    Numbers of fp16 stay finite if they were: infinity and NaN tell who scales losses of an overflow.
    """
    found = values * (room / divisor)[:, None]
    if values.dtype == tl.float16:
        most = tl.where(tl.abs(values.to(tl.float32)) <= _FP16_MOST, _FP16_MOST, float("inf"))
        found = tl.where(tl.abs(found) > most, tl.where(found > 0, most, -most), found)
    return found.to(values.dtype)


@triton.jit
def _place(state, pair, part, parts, tile):
    return state + (pair.to(tl.int64) * parts + part) * ((tile.V + 2) * tile.F)


@triton.jit
def _read(state, row, tile):
    """A row of a state [WIDE_F]; −infinity and 0 are both nothing where a feature is none."""
    f = tl.arange(0, tile.WIDE_F)
    return tl.load(state + row * tile.F + f, mask=f < tile.F, other=0.0)


@triton.jit
def _columns(state, column, tile):
    """Columns of v of a state: [BLOCK_V, WIDE_F]."""
    v, f = column + tl.arange(0, tile.BLOCK_V), tl.arange(0, tile.WIDE_F)
    inside = (v[:, None] < tile.V) & (f[None, :] < tile.F)
    return tl.load(state + v[:, None] * tile.F + f[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "walk"])
def gather_kernel(
    x, y, mask, omega, known, den, extra, out, m_b, m_s, heads, n, walk, scale, eps, room, tile, QUERIES: tl.constexpr
):
    """A state of `walk` chunks to each part of `out`: of keys and values, or of QUERIES and gradients of outputs.

    The latter are divided by den + eps, and what z is the sum of is weighed by `extra`; `known` is the state of keys.
    Divisors grow with the sequence, and fp16 has little room below: gradients are multiplied by `room` in between.
    """
    column, head, batch, pair = _whose(heads, tile, True)
    part, parts = tl.program_id(1), tl.num_programs(1)
    r, f = tl.arange(0, tile.CHUNK), tl.arange(0, tile.WIDE_F)
    chunks = tl.cdiv(n, tile.CHUNK)
    state, z = tl.zeros([tile.WIDE_F, tile.BLOCK_V], tl.float32), tl.zeros([tile.WIDE_F], tl.float32)
    top = tl.zeros([tile.WIDE_F], tl.float32)
    if tile.MAP == "performer":
        if QUERIES:
            top = _read(_place(known, pair, 0, 1, tile), tile.V + 1, tile)
        else:
            top -= float("inf")
    for chunk in tl.range(part * walk, tl.minimum(part * walk + walk, chunks)):
        token = chunk * tile.CHUNK
        rows = load(x, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, True)
        values = load(y, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        some = 1.0
        if QUERIES:
            at, inside = pair.to(tl.int64) * n + token + r, r < n - token
            divisor = tl.load(den + at, mask=inside, other=1.0) + eps
            some = tl.load(extra + at, mask=inside, other=0.0)
            values = _divided(values, divisor, room)
            features = tl.where(inside[None, :], _of_query(rows, omega, scale, top, tile, True), 0.0)
            some = some[None, :]
        else:
            weight = _seen(mask, batch, token, n, m_b, m_s, tile)
            if mask is not None:
                values = tl.where(weight[:, None] == -float("inf"), 0.0, values).to(values.dtype)
            if tile.MAP == "performer":
                found = _logarithms(rows, omega, scale, tile, True)
                found = tl.where(weight[None, :] == -float("inf"), -float("inf"), found + weight[None, :])
                more = tl.maximum(top, tl.max(found, 1))
                kept = tl.exp(top - _finite(more))
                state, z, top = state * kept[:, None], z * kept, more
                features = tl.exp(found - _finite(more)[:, None])
            else:
                features = mapped(rows, tile, True) * tl.exp(weight)[None, :]
                if mask is not None:
                    features = tl.where(weight[None, :] == -float("inf"), 0.0, features)
        factor = features.to(values.dtype)
        state += dot(factor, values, tile)
        z += tl.sum(factor.to(tl.float32) * some, 1)
    to, v = _place(out, pair, part, parts, tile), column + tl.arange(0, tile.BLOCK_V)
    state = state / room if QUERIES else state
    tl.store(to + v[None, :] * tile.F + f[:, None], state, mask=(v[None, :] < tile.V) & (f[:, None] < tile.F))
    if column == 0:
        tl.store(to + tile.V * tile.F + f, z, mask=f < tile.F)
        tl.store(to + (tile.V + 1) * tile.F + f, top, mask=f < tile.F)


@triton.jit(do_not_specialize=["parts"])
def join_kernel(
    given, out, parts, V: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, WIDE_F: tl.constexpr, TOPS: tl.constexpr
):
    """The states of all parts, one. TOPS: each is divided by e to its last row."""
    pair = tl.program_id(0)
    row, f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE_F)
    size: tl.constexpr = (V + 2) * F
    base, inside = given + pair.to(tl.int64) * parts * size, (row[:, None] <= V) & (f[None, :] < F)
    top, total = tl.zeros([WIDE_F], tl.float32), tl.zeros([BLOCK, WIDE_F], tl.float32)
    if TOPS:
        top -= float("inf")
        for part in tl.range(0, parts):
            top = tl.maximum(top, tl.load(base + part * size + (V + 1) * F + f, mask=f < F, other=0.0))
    for part in tl.range(0, parts):
        found = tl.load(base + part * size + row[:, None] * F + f[None, :], mask=inside, other=0.0)
        if TOPS:
            own = tl.load(base + part * size + (V + 1) * F + f, mask=f < F, other=0.0)
            found *= tl.exp(own - _finite(top))[None, :]
        total += found
    to = out + pair.to(tl.int64) * size
    tl.store(to + row[:, None] * F + f[None, :], total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(to + (V + 1) * F + f, top, mask=f < F)


@triton.jit(do_not_specialize=["heads", "n"])
def read_kernel(q, omega, state, o, den, heads, n, scale, eps, tile):
    """o of a chunk of queries, and den_i = Σ_j φ(q_i) · φ(k_j)."""
    column, head, batch, pair = _whose(heads, tile, True)
    token, r = tl.program_id(1) * tile.CHUNK, tl.arange(0, tile.CHUNK)
    whole = _place(state, pair, 0, 1, tile)
    rows = load(q, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
    factor = _of_query(rows, omega, scale, _read(whole, tile.V + 1, tile), tile, False).to(rows.dtype)
    columns, room = factored(_columns(whole, column, tile), rows)
    weight = tl.sum(factor.to(tl.float32) * _read(whole, tile.V, tile)[None, :], 1)
    found = dot(factor, tl.trans(columns), tile) * (room / (weight + eps))[:, None]
    put(o, found, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
    if column == 0:
        tl.store(den + pair.to(tl.int64) * n + token + r, weight, mask=r < n - token)


@triton.jit
def _through(rows, features, gradient, omega, scale, tile):
    """The gradient of rows, of that of their features, which were counted for what they count for."""
    if tile.MAP == "performer":
        change = gradient * features
        high = change.to(rows.dtype)
        directions = _omega(omega, 0, tile, True)
        found = dot(high, directions, tile)
        if not tile.EXACT:
            found += dot((change - high.to(tl.float32)).to(rows.dtype), directions, tile)
            found += dot(high, _omega(omega, 1, tile, True), tile)
        found -= rows.to(tl.float32) * (tl.sum(change, 1) * scale)[:, None]
    else:
        found = pulled_back(mapped(rows, tile, False), gradient, tile, False)
    return found


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def spread_kernel(
    x,
    y,
    o,
    mask,
    omega,
    state,
    grads,
    den,
    extra,
    dx,
    dy,
    m_b,
    m_s,
    heads,
    n,
    scale,
    eps,
    room,
    tile,
    QUERIES: tl.constexpr,
):
    """Gradients of a chunk of keys and values, or of QUERIES, whose y is the gradient of o.

    Of queries `extra` is written, the gradient of den; of keys it is in `grads` already.
    """
    _, head, batch, pair = _whose(heads, tile, False)
    token, r = tl.program_id(1) * tile.CHUNK, tl.arange(0, tile.CHUNK)
    at, inside = pair.to(tl.int64) * n + token + r, r < n - token
    whole, above = _place(state, pair, 0, 1, tile), _place(grads, pair, 0, 1, tile)
    rows = load(x, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE, False)
    top = _read(whole, tile.V + 1, tile)
    divisor, weight = tl.full([tile.CHUNK], 1.0, tl.float32), tl.zeros([tile.CHUNK], tl.float32)
    if QUERIES:
        features = _of_query(rows, omega, scale, top, tile, False)
        divisor = tl.load(den + at, mask=inside, other=1.0) + eps
    else:
        weight = _seen(mask, batch, token, n, m_b, m_s, tile)
        features = _of_key(rows, omega, scale, weight, top, tile)
    hidden = weight == -float("inf")
    factor = features.to(rows.dtype)
    gradient = tl.zeros([tile.CHUNK, tile.WIDE_F], tl.float32)
    more = tl.zeros([tile.CHUNK], tl.float32)
    for column in tl.range(0, tile.V, tile.BLOCK_V):
        values = load(y, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
        columns, room = factored(_columns(whole if QUERIES else above, column, tile), rows)
        if QUERIES:
            outputs = load(o, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V, False)
            more -= tl.sum(values.to(tl.float32) * outputs.to(tl.float32), 1)
            values = _divided(values, divisor, room)
        else:
            found = dot(factor, tl.trans(columns), tile) * room
            found = tl.where(hidden[:, None], 0.0, found)
            put(dy, found, batch, head, token, n, column, tile.CHUNK, tile.V, tile.BLOCK_V)
        gradient += dot(values, columns, tile) * room
    if QUERIES:
        more = more / divisor
        tl.store(extra + at, more, mask=inside)
        gradient = gradient / room + more[:, None] * _read(whole, tile.V, tile)[None, :]
    else:
        gradient += _read(above, tile.V, tile)[None, :]
        if tile.MAP != "performer":
            gradient *= tl.exp(weight)[:, None]
        gradient = tl.where(hidden[:, None], 0.0, gradient)
        features = tl.where(hidden[:, None], 0.0, features)
        rows = tl.where(hidden[:, None], 0.0, rows).to(rows.dtype)
    found = _through(rows, features, gradient, omega, scale, tile)
    put(dx, found, batch, head, token, n, 0, tile.CHUNK, tile.D, tile.WIDE)
