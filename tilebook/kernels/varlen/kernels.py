"""The kernels for packed sequences: attention's inner loops, with rows and columns counted from a sequence's start.

Of a tensor (T, H, D) the sequence's first row is what the inner loops call the batch, and its stride that of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilebook.kernels.attention.backward_columns import column_step
from tilebook.kernels.attention.backward_rows import row_loop
from tilebook.kernels.attention.forward import attend
from tilebook.kernels.attention.scores import columns_seen, rows_seen
from tilebook.kernels.attention.tiles import LN2, LOG2E, load_tile, place, rounded, store_tile
from tilebook.kernels.varlen.blocks import located, stretch


@triton.jit
def _columns(row, height, n_k, before, after, LIMITED: tl.constexpr, BLOCK_N: tl.constexpr):
    """[first, clear, whole, last): columns that a block of rows visits; from `clear` to `whole` without masks."""
    first = 0
    clear = 0
    whole = n_k // BLOCK_N * BLOCK_N
    last = n_k
    if LIMITED:
        first, clear, whole, last = columns_seen(row, height, n_k, before, after)
        if before is not None:  # else `clear` stays the constant 0, without which tiles would not be loaded ahead
            first = first // BLOCK_N * BLOCK_N
            clear = tl.minimum(tl.cdiv(clear, BLOCK_N) * BLOCK_N, tl.cdiv(last, BLOCK_N) * BLOCK_N)
        whole = tl.maximum(whole // BLOCK_N * BLOCK_N, clear)
    return first, clear, whole, last


@triton.jit(do_not_specialize=["n_sequences", "n_heads", "group", "total_q", "total_k", "left", "right"])
def varlen_fwd(
    q, k, v, o, lse, cu_q, cu_k,
    stride_qs, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_os, stride_oh,
    n_sequences, n_heads, group, total_q, total_k, scale, left, right, softcap,
    BOTTOM_RIGHT: tl.constexpr, LIMITED: tl.constexpr, SCORED: tl.constexpr, TF32: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """o and lse of one block of rows of one sequence; 0 and -infinity behind the last sequence."""
    blocks = total_q // BLOCK_M + n_sequences + 1
    block, head = place(tl.program_id(0), blocks, n_heads, HEADS)
    if right is not None and left is None:
        block = blocks - 1 - block  # the last rows see the most columns: start with them
    sequence, start, n_q, row = located(block, cu_q, n_sequences, total_q, BLOCK_M)
    if row >= n_q:
        return
    start_k, n_k = stretch(cu_k, sequence, n_sequences, total_k, 0)
    kv_head = head // group
    shift = n_k - n_q if BOTTOM_RIGHT else 0
    extras = (
        None if left is None else left - shift, None if right is None else right + shift,
        None, None, None, None, None, None, softcap, None, None,
    )  # fmt: skip

    q_tile = load_tile(q, start, head, row, stride_qs, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS)
    q_tile = rounded(q_tile, TF32)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    weight = tl.zeros([BLOCK_M, 8] if WIDTH <= 64 else [BLOCK_M], dtype=tl.float32)  # in parts, as `attend` adds it up
    peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    factor = scale if SCORED else scale * LOG2E
    first, clear, whole, last = _columns(row, BLOCK_M, n_k, extras[0], extras[1], LIMITED, BLOCK_N)
    if left is not None:
        acc, weight, peak = attend(
            acc, weight, peak, q_tile, k, v, start_k, kv_head, head, first, clear, row,
            stride_ks, stride_kh, stride_ks, stride_vs, stride_vh, stride_vs, n_q, n_k, factor, extras,
            True, False, LIMITED, SCORED, LIMITED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
        )  # fmt: skip
    acc, weight, peak = attend(
        acc, weight, peak, q_tile, k, v, start_k, kv_head, head, clear, whole, row,
        stride_ks, stride_kh, stride_ks, stride_vs, stride_vh, stride_vs, n_q, n_k, factor, extras,
        False, False, LIMITED, SCORED, LIMITED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip
    acc, weight, peak = attend(
        acc, weight, peak, q_tile, k, v, start_k, kv_head, head, whole, last, row,
        stride_ks, stride_kh, stride_ks, stride_vs, stride_vh, stride_vs, n_q, n_k, factor, extras,
        True, False, LIMITED, SCORED, LIMITED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip

    if WIDTH <= 64:
        weight = tl.sum(weight, 1)
    share = tl.where(weight == 0.0, 1.0, weight)  # a row that sees nothing is 0, and its log-sum-exp -inf
    store_tile(o, acc / share[:, None], start, head, row, stride_os, stride_oh, stride_os, n_q, BLOCK_M, D, WIDTH)
    rows = row + tl.arange(0, BLOCK_M)
    total = peak + tl.log2(weight) * LN2 if SCORED else (peak + tl.log2(weight)) * LN2
    tl.store(lse + head.to(tl.int64) * total_q + start + rows, total, mask=rows < n_q)


@triton.jit(do_not_specialize=["n_sequences", "n_heads", "group", "total_q", "total_k", "left", "right"])
def varlen_bwd_dq(
    q, k, v, do, o, lse, delta, dq_out, cu_q, cu_k,
    stride_qs, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_ds, stride_dh, stride_os, stride_oh,
    stride_dqs, stride_dqh,
    n_sequences, n_heads, group, total_q, total_k, scale, left, right, softcap,
    BOTTOM_RIGHT: tl.constexpr, LIMITED: tl.constexpr, SCORED: tl.constexpr, TF32: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dq of one block of rows of one sequence; also delta, which needs nothing that is not already here."""
    blocks = total_q // BLOCK_M + n_sequences + 1
    block, head = place(tl.program_id(0), blocks, n_heads, HEADS)
    if right is not None and left is None:
        block = blocks - 1 - block  # the last rows see the most columns: start with them
    sequence, start, n_q, row = located(block, cu_q, n_sequences, total_q, BLOCK_M)
    if row >= n_q:
        return
    start_k, n_k = stretch(cu_k, sequence, n_sequences, total_k, 0)
    kv_head = head // group
    shift = n_k - n_q if BOTTOM_RIGHT else 0
    extras = (
        None if left is None else left - shift, None if right is None else right + shift,
        None, None, None, None, None, None, softcap, None, None,
    )  # fmt: skip

    do_tile = load_tile(
        do, start, head, row, stride_ds, stride_dh, stride_ds, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS
    )
    o_tile = load_tile(o, start, head, row, stride_os, stride_oh, stride_os, n_q, BLOCK_M, D, WIDTH, True, False)
    row_delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * total_q + start + rows
    tl.store(delta + at, row_delta, mask=rows < n_q)
    row_lse = tl.load(lse + at, mask=rows < n_q, other=float("inf"))
    row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)  # a row that saw nothing: p is 0 again
    if not SCORED:
        row_lse = row_lse * LOG2E
    q_tile = load_tile(q, start, head, row, stride_qs, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS)
    q_tile, do_tile = rounded(q_tile, TF32), rounded(do_tile, TF32)
    dq = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    none = tl.zeros([BLOCK_M], dtype=tl.float32)  # for dropout, which sequences in a pack do not have
    factor = scale if SCORED else scale * LOG2E
    first, clear, whole, last = _columns(row, BLOCK_M, n_k, extras[0], extras[1], LIMITED, BLOCK_N)
    if left is not None:
        dq, none = row_loop(
            dq, none, q_tile, do_tile, row_lse, row_delta, k, v, None, start_k, kv_head, head, first, clear, row,
            stride_ks, stride_kh, stride_ks, stride_vs, stride_vh, stride_vs, n_q, n_k, factor, extras,
            True, False, LIMITED, SCORED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, True,
        )  # fmt: skip
    dq, none = row_loop(
        dq, none, q_tile, do_tile, row_lse, row_delta, k, v, None, start_k, kv_head, head, clear, whole, row,
        stride_ks, stride_kh, stride_ks, stride_vs, stride_vh, stride_vs, n_q, n_k, factor, extras,
        False, False, LIMITED, SCORED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, True,
    )  # fmt: skip
    dq, none = row_loop(
        dq, none, q_tile, do_tile, row_lse, row_delta, k, v, None, start_k, kv_head, head, whole, last, row,
        stride_ks, stride_kh, stride_ks, stride_vs, stride_vh, stride_vs, n_q, n_k, factor, extras,
        True, False, LIMITED, SCORED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS, True,
    )  # fmt: skip
    store_tile(dq_out, dq * scale, start, head, row, stride_dqs, stride_dqh, stride_dqs, n_q, BLOCK_M, D, WIDTH)


@triton.jit(do_not_specialize=["n_sequences", "n_heads_kv", "group", "total_q", "total_k", "left", "right"])
def varlen_bwd_dkdv(
    q, k, v, do, lse, delta, dk_out, dv_out, cu_q, cu_k,
    stride_qs, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_ds, stride_dh,
    stride_dks, stride_dkh, stride_dvs, stride_dvh,
    n_sequences, n_heads_kv, group, total_q, total_k, scale, left, right, softcap,
    BOTTOM_RIGHT: tl.constexpr, LIMITED: tl.constexpr, SCORED: tl.constexpr, TF32: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of columns of one sequence, over the rows of every query head that shares them."""
    blocks = total_k // BLOCK_N + n_sequences + 1
    block, kv_head = place(tl.program_id(0), blocks, n_heads_kv, HEADS)
    sequence, start_k, n_k, column = located(block, cu_k, n_sequences, total_k, BLOCK_N)
    if column >= n_k:
        return
    start, n_q = stretch(cu_q, sequence, n_sequences, total_q, 0)
    shift = n_k - n_q if BOTTOM_RIGHT else 0
    extras = (
        None if left is None else left - shift, None if right is None else right + shift,
        None, None, None, None, None, None, softcap, None, None,
    )  # fmt: skip

    k_tile = load_tile(
        k, start_k, kv_head, column, stride_ks, stride_kh, stride_ks, n_k, BLOCK_N, D, WIDTH, True, DESCRIPTORS
    )
    v_tile = load_tile(
        v, start_k, kv_head, column, stride_vs, stride_vh, stride_vs, n_k, BLOCK_N, D, WIDTH, True, DESCRIPTORS
    )
    k_tile, v_tile = rounded(k_tile, TF32), rounded(v_tile, TF32)
    dk = tl.zeros([BLOCK_N, D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, D], dtype=tl.float32)

    # Blocks of rows: those of the band's edges and the ragged last one need masks; those between them do not.
    first = 0
    clear = 0
    ragged = n_q // BLOCK_M
    end = tl.cdiv(n_q, BLOCK_M)
    if LIMITED:
        first, clear, ragged, end = rows_seen(column, BLOCK_N, n_q, extras[0], extras[1])
        first, end = first // BLOCK_M, tl.cdiv(end, BLOCK_M)
        clear = tl.maximum(tl.minimum(tl.cdiv(clear, BLOCK_M), end), first)
        ragged = tl.maximum(tl.minimum(ragged // BLOCK_M, end), clear)
    n_masked = clear - first + end - ragged
    factor = scale if SCORED else scale * LOG2E
    for member in range(0, group):
        head = kv_head * group + member
        own = head.to(tl.int64) * total_q + start  # of this head and sequence, so it is pair 0 of what follows
        pair = head * 0
        for index in tl.range(0, n_masked, disable_licm=D >= 128):  # as in attention: wide tiles spill else
            at = tl.where(index < clear - first, first + index, ragged + index - (clear - first))
            dk, dv = column_step(
                dk, dv, k_tile, v_tile, q, do, lse + own, delta + own, start, head, pair, at, column,
                stride_qs, stride_qh, stride_qs, stride_ds, stride_dh, stride_ds, n_q, n_k, factor, extras,
                True, False, LIMITED, SCORED, LIMITED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip
        for at in tl.range(clear, ragged, disable_licm=D >= 128):
            dk, dv = column_step(
                dk, dv, k_tile, v_tile, q, do, lse + own, delta + own, start, head, pair, at, column,
                stride_qs, stride_qh, stride_qs, stride_ds, stride_dh, stride_ds, n_q, n_k, factor, extras,
                False, False, LIMITED, SCORED, LIMITED, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
            )  # fmt: skip
    store_tile(dk_out, dk * scale, start_k, kv_head, column, stride_dks, stride_dkh, stride_dks, n_k, BLOCK_N, D, WIDTH)
    store_tile(dv_out, dv, start_k, kv_head, column, stride_dvs, stride_dvh, stride_dvs, n_k, BLOCK_N, D, WIDTH)


@triton.jit(do_not_specialize=["n_sequences", "total"])
def clear_rest(x, cu_seqlens, stride, n_sequences, total, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in those of ROWS rows of `x`, (total, WIDTH), that lie behind the last sequence."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    past = (rows >= tl.load(cu_seqlens + n_sequences)) & (rows < total)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        there = past[:, None] & (columns < WIDTH)[None, :]
        nothing = tl.zeros([ROWS, BLOCK], dtype=x.dtype.element_ty)
        tl.store(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], nothing, mask=there)
