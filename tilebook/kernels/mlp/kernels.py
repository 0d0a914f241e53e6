"""The MLP's Triton kernels: one tile of a product, (M, K) times (K, N), and three epilogues for it."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Constants of a product (M, K) times (K, N). EVEN_N, EVEN_K: a block divides N, K. PART: columns that an epilogue
    works on at a time. DESCRIPTORS, SPLIT: as `space.SPACE` has them."""

    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_K: Any
    GROUP_M: Any
    EVEN_N: Any
    EVEN_K: Any
    DESCRIPTORS: Any
    PART: Any
    SPLIT: Any


@triton.jit
def place(pid, M, N, tile):
    """First row and column of a program's tile; GROUP_M rows of tiles share the columns that they read in L2."""
    tiles_m, tiles_n = tl.cdiv(M, tile.BLOCK_M), tl.cdiv(N, tile.BLOCK_N)
    first = pid // (tile.GROUP_M * tiles_n) * tile.GROUP_M
    height = tl.minimum(tiles_m - first, tile.GROUP_M)
    inside = pid % (tile.GROUP_M * tiles_n)
    return (first + inside % height) * tile.BLOCK_M, (inside // height) * tile.BLOCK_N


@triton.jit
def product(a, b, lda, ldb, m0, n0, M, N, K, tile, B_IS_KN: tl.constexpr):
    """The tile at (m0, n0) of a times b in fp32; a is (M, K), b is (K, N) or, as weights are stored, (N, K)."""
    acc = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
    if tile.DESCRIPTORS:
        for k in range(0, K, tile.BLOCK_K):
            left = a.load([m0, k])
            right = b.load([k, n0]) if B_IS_KN else b.load([n0, k]).T
            acc = tl.dot(left, right, acc)
    else:
        # Rows past the end repeat the last one: their products are never stored, and the loop needs no mask for them.
        depth = tl.arange(0, tile.BLOCK_K)
        rows = tl.minimum(m0 + tl.arange(0, tile.BLOCK_M), M - 1).to(tl.int64)
        columns = n0 + tl.arange(0, tile.BLOCK_N)
        a_ptrs = a + rows[:, None] * lda + depth[None, :]
        if B_IS_KN:
            b_ptrs = b + depth[:, None].to(tl.int64) * ldb + columns[None, :]
        else:
            b_ptrs = b + tl.minimum(columns, N - 1)[None, :].to(tl.int64) * ldb + depth[:, None]
        for k in range(0, K, tile.BLOCK_K):
            a_mask = None if tile.EVEN_K else (depth < K - k)[None, :]
            b_mask = None if tile.EVEN_K else (depth < K - k)[:, None]
            if B_IS_KN and not tile.EVEN_N:
                # Clamped columns would no longer be contiguous.
                b_mask = (columns < N)[None, :] if tile.EVEN_K else b_mask & (columns < N)[None, :]
            left = tl.load(a_ptrs, mask=a_mask, other=None if tile.EVEN_K else 0.0)
            right = tl.load(b_ptrs, mask=b_mask, other=None if b_mask is None else 0.0)
            acc = tl.dot(left, right, acc)
            a_ptrs += tile.BLOCK_K
            b_ptrs += tile.BLOCK_K * ldb if B_IS_KN else tile.BLOCK_K
    return acc


@triton.jit
def _offsets(m0, n0, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a tile in a contiguous (M, N) tensor, and which of them lie inside."""
    rows = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    return rows[:, None].to(tl.int64) * N + columns[None, :], (rows < M)[:, None] & (columns < N)[None, :]


@triton.jit
def store(out, values, m0, n0, M, N, DESCRIPTORS: tl.constexpr):
    if DESCRIPTORS == 2:
        out.store([m0, n0], values)
    else:
        offsets, inside = _offsets(m0, n0, M, N, values.shape[0], values.shape[1])
        tl.store(out + offsets, values, mask=inside)


@triton.jit(do_not_specialize=["M"])
def share_kernel(a, b, shares, lda, ldb, M, N, K, tile, B_IS_KN: tl.constexpr):
    """One of SPLIT shares of the K products of each sum, in fp32: shares is (SPLIT, M, N)."""
    m0, n0 = place(tl.program_id(0), M, N, tile)
    share = tl.program_id(1)
    length = tl.cdiv(K, tile.BLOCK_K * tile.SPLIT) * tile.BLOCK_K
    k0 = share * length
    left, right = a + k0, b + (k0.to(tl.int64) * ldb if B_IS_KN else k0)
    acc = product(left, right, lda, ldb, m0, n0, M, N, tl.minimum(K - k0, length), tile, B_IS_KN)
    store(shares + share.to(tl.int64) * M * N, acc, m0, n0, M, N, 0)


@triton.jit
def _summed(a, b, lda, ldb, m0, n0, M, N, K, tile, B_IS_KN: tl.constexpr):
    """The tile at (m0, n0) of a times b; where it is split, a holds the shares, which are added in one fixed order."""
    if tile.SPLIT == 1:
        acc = product(a, b, lda, ldb, m0, n0, M, N, K, tile, B_IS_KN)
    else:
        offsets, inside = _offsets(m0, n0, M, N, tile.BLOCK_M, tile.BLOCK_N)
        acc = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
        for _ in range(tile.SPLIT):
            acc += tl.load(a + offsets, mask=inside, other=0.0)
            offsets += M * N
    return acc


@triton.jit
def _halves(values):
    """The left and the right half of a tile; no data moves as long as warps divide the rows alone."""
    return tl.reshape(values, (values.shape[0], 2, values.shape[1] // 2)).permute(0, 2, 1).split()


@triton.jit
def _bias(b, n0, N, BLOCK_N: tl.constexpr):
    columns = n0 + tl.arange(0, BLOCK_N)
    return tl.load(b + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gate(z, ACTIVATION: tl.constexpr):
    """The share of z that passes: act(z) = z · gate(z), for GELU gate = Φ, the normal distribution.

    logit Φ(z) / z is a smooth even function: a minimax fit of degree 7 in z² on |z| ≤ 5 gives z · Φ(z) to 1e-7, and
    the tail, where 1 + erf cancels, to 1e-4 of itself, with three fifths of the instructions of erf. For tanh GELU
    degree 1 is exact. Neither overflows: 2^(zq) reaches 0 or infinity, the gate 1 or 0.
    """
    s = z * z
    if ACTIVATION == "gelu":
        s = tl.minimum(s, 25.0)
        q = 9.59214444e-11 * s - 1.0746172e-8
        q = q * s + 5.04958734e-7
        q = q * s - 1.26939121e-5
        q = q * s + 1.65888952e-4
        q = q * s + 7.88417092e-5
        q = q * s - 1.04819655e-1
        q = q * s - 2.30221391
    else:
        q = -1.02943240e-1 * s - 2.30220820
    return 1.0 / (1.0 + tl.exp2(z * q))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    return tl.where(z <= 0.0, 0.0, z) if ACTIVATION == "relu" else z * _gate(z, ACTIVATION)


@triton.jit
def _activate_bwd(z, dh, ACTIVATION: tl.constexpr):
    """(dh · act′(z), act(z))."""
    if ACTIVATION == "relu":
        dz = tl.where(z <= 0.0, 0.0, dh)
        h = tl.where(z <= 0.0, 0.0, z)
    else:
        gate = _gate(z, ACTIVATION)
        h = z * gate
        if ACTIVATION == "gelu":
            slope = gate + z * (0.398942280 * tl.exp2(-0.721347520 * (z * z)))  # Φ(z) + z φ(z)
        else:
            slope = gate + h * (1.0 - gate) * (1.59576912 + 0.214064489 * (z * z))
        dz = dh * slope
    return dz, h


# Epilogues, PART columns at a time: a whole tile of fp32 intermediates beside the accumulators would spill.


@triton.jit
def _up_epilogue(acc, b1, h, z, m0, n0, M, N, tile, ACTIVATION: tl.constexpr, SAVE: tl.constexpr):
    if acc.shape[1] > tile.PART:
        left, right = _halves(acc)
        _up_epilogue(left, b1, h, z, m0, n0, M, N, tile, ACTIVATION, SAVE)
        _up_epilogue(right, b1, h, z, m0, n0 + left.shape[1], M, N, tile, ACTIVATION, SAVE)
    else:
        # act is taken of the rounded z, so that the backward, which knows no other, recomputes the same h.
        rounded = (acc + _bias(b1, n0, N, acc.shape[1])).to(b1.dtype.element_ty)
        if SAVE:
            store(z, rounded, m0, n0, M, N, tile.DESCRIPTORS)
        active = _activate(rounded.to(tl.float32), ACTIVATION)
        store(h, active.to(b1.dtype.element_ty), m0, n0, M, N, tile.DESCRIPTORS)


@triton.jit
def _down_epilogue(acc, b2, y, m0, n0, M, N, tile):
    if acc.shape[1] > tile.PART:
        left, right = _halves(acc)
        _down_epilogue(left, b2, y, m0, n0, M, N, tile)
        _down_epilogue(right, b2, y, m0, n0 + left.shape[1], M, N, tile)
    else:
        values = acc + _bias(b2, n0, N, acc.shape[1])
        store(y, values.to(b2.dtype.element_ty), m0, n0, M, N, tile.DESCRIPTORS)


@triton.jit
def _act_bwd_epilogue(dh, z, dz, h, m0, n0, M, N, tile, ACTIVATION: tl.constexpr):
    if dh.shape[1] > tile.PART:
        left, right = _halves(dh)
        _act_bwd_epilogue(left, z, dz, h, m0, n0, M, N, tile, ACTIVATION)
        _act_bwd_epilogue(right, z, dz, h, m0, n0 + left.shape[1], M, N, tile, ACTIVATION)
    else:
        if tile.DESCRIPTORS == 2:
            saved = z.load([m0, n0])
        else:
            offsets, inside = _offsets(m0, n0, M, N, dh.shape[0], dh.shape[1])
            saved = tl.load(z + offsets, mask=inside, other=0.0)
        grad, active = _activate_bwd(saved.to(tl.float32), dh, ACTIVATION)
        store(dz, grad.to(saved.dtype), m0, n0, M, N, tile.DESCRIPTORS)
        store(h, active.to(saved.dtype), m0, n0, M, N, tile.DESCRIPTORS)


# The kernels themselves: of a product, or of the shares of one.


@triton.jit(do_not_specialize=["M"])
def up_fwd_kernel(x, w1, b1, h, z, ldx, ldw, M, N, K, tile, ACTIVATION: tl.constexpr, SAVE: tl.constexpr):
    m0, n0 = place(tl.program_id(0), M, N, tile)
    acc = _summed(x, w1, ldx, ldw, m0, n0, M, N, K, tile, False)
    _up_epilogue(acc, b1, h, z, m0, n0, M, N, tile, ACTIVATION, SAVE)


@triton.jit(do_not_specialize=["M"])
def down_fwd_kernel(h, w2, b2, y, ldh, ldw, M, N, K, tile):
    m0, n0 = place(tl.program_id(0), M, N, tile)
    acc = _summed(h, w2, ldh, ldw, m0, n0, M, N, K, tile, False)
    _down_epilogue(acc, b2, y, m0, n0, M, N, tile)


@triton.jit(do_not_specialize=["M"])
def act_bwd_kernel(dy, w2, z, dz, h, lddy, ldw, M, N, K, tile, ACTIVATION: tl.constexpr):
    m0, n0 = place(tl.program_id(0), M, N, tile)
    dh = _summed(dy, w2, lddy, ldw, m0, n0, M, N, K, tile, True)
    _act_bwd_epilogue(dh, z, dz, h, m0, n0, M, N, tile, ACTIVATION)
