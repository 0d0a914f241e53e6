"""The MLP's gradients once dz is known, in one launch: dx = dz W1, dW1 = dzᵀ x, dW2 = dyᵀ h, and both biases' sums.

Each of the three products is too small to fill a GPU by itself at the sizes of small transformers, and each sum is a
launch more; side by side they share its SMs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.mlp.kernels import place, product, store

COLUMNS = tl.constexpr(64)
"""Columns that a program sums up. As many accumulators a thread as leave room for loads in flight make its rows."""


@triton.jit
def _outer(a, b, out, lda, ldb, number, R, C, K, tile, EVEN_R: tl.constexpr, EVEN_C: tl.constexpr):
    """Tile number `number` of out (R, C) = aᵀ b, for a (K, R) and b (K, C)."""
    across = tl.cdiv(C, tile.BLOCK_N)
    r0, c0 = number // across * tile.BLOCK_M, number % across * tile.BLOCK_N
    depth = tl.arange(0, tile.BLOCK_K)
    rows, columns = r0 + tl.arange(0, tile.BLOCK_M), c0 + tl.arange(0, tile.BLOCK_N)
    a_ptrs = a + depth[:, None].to(tl.int64) * lda + rows[None, :]
    b_ptrs = b + depth[:, None].to(tl.int64) * ldb + columns[None, :]
    acc = tl.zeros((tile.BLOCK_M, tile.BLOCK_N), tl.float32)
    for k in range(0, K, tile.BLOCK_K):
        # Masked always: K is the number of tokens, and a kernel for each way it divides would be one too many.
        left_mask = (depth < K - k)[:, None]
        right_mask = left_mask
        if not EVEN_R:
            left_mask = left_mask & (rows < R)[None, :]
        if not EVEN_C:
            right_mask = right_mask & (columns < C)[None, :]
        left = tl.load(a_ptrs, mask=left_mask, other=0.0)
        right = tl.load(b_ptrs, mask=right_mask, other=0.0)
        acc = tl.dot(left.T, right, acc)
        a_ptrs += tile.BLOCK_K * lda
        b_ptrs += tile.BLOCK_K * ldb
    store(out, acc.to(out.dtype.element_ty), r0, c0, R, C, 0)


@triton.jit
def _column_sums(a, out, lda, c0, C, K, ROWS: tl.constexpr):
    """COLUMNS sums over the K rows of a (K, C), from column c0 on."""
    rows, columns = tl.arange(0, ROWS), c0 + tl.arange(0, COLUMNS)
    inside = (columns < C)[None, :]
    ptrs = a + rows[:, None].to(tl.int64) * lda + columns[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in tl.range(0, K, ROWS, num_stages=3):
        acc += tl.load(ptrs, mask=(rows < K - k)[:, None] & inside, other=0.0).to(tl.float32)
        ptrs += ROWS * lda
    tl.store(out + columns, tl.sum(acc, 0).to(out.dtype.element_ty), mask=columns < C)


@triton.jit(do_not_specialize=["M"])
def grads_kernel(
    dy, h, dz, x, w1, dx, dw1, db1, dw2, db2, ldy, ldx, ldw, M, WIDTH, INNER, tile,
    EVEN_H: tl.constexpr, EVEN_I: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The longest tiles first: those of dW1 and dW2, which sum over all rows, then those of dx, then the bias sums.

    tile is that of dx. EVEN_H, EVEN_I: BLOCK_M and BLOCK_N divide WIDTH, INNER.
    """
    pid = tl.program_id(0)
    n_w1 = tl.cdiv(INNER, tile.BLOCK_M) * tl.cdiv(WIDTH, tile.BLOCK_N)
    n_w2 = tl.cdiv(WIDTH, tile.BLOCK_M) * tl.cdiv(INNER, tile.BLOCK_N)
    n_x = tl.cdiv(M, tile.BLOCK_M) * tl.cdiv(WIDTH, tile.BLOCK_N)
    if pid < n_w1:
        _outer(dz, x, dw1, INNER, ldx, pid, INNER, WIDTH, M, tile, EVEN_I, EVEN_H)
    elif pid < n_w1 + n_w2:
        _outer(dy, h, dw2, ldy, INNER, pid - n_w1, WIDTH, INNER, M, tile, EVEN_H, EVEN_I)
    elif pid < n_w1 + n_w2 + n_x:
        m0, n0 = place(pid - n_w1 - n_w2, M, WIDTH, tile)
        acc = product(dz, w1, INNER, ldw, m0, n0, M, WIDTH, INNER, tile, True)
        store(dx, acc.to(dx.dtype.element_ty), m0, n0, M, WIDTH, 0)
    else:
        c0 = (pid - n_w1 - n_w2 - n_x) * COLUMNS
        padded = tl.cdiv(INNER, COLUMNS) * COLUMNS
        if c0 < padded:
            _column_sums(dz, db1, INNER, c0, INNER, M, ROWS)
        else:
            _column_sums(dy, db2, ldy, c0 - padded, WIDTH, M, ROWS)
