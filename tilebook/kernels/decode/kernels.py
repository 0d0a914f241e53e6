"""The decode kernels: attention over one share of the keys, and the merger of the shares."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tilebook.kernels.attention.triton.tiles import LN2, LOG2E


class Steps(NamedTuple):
    """Elements from batch to batch, head to head and row to row of q and o; from block to block, key to key and head to
    head of the caches. The last axes are contiguous."""

    q_b: Any
    q_h: Any
    q_s: Any
    k_b: Any
    k_s: Any
    k_h: Any
    v_b: Any
    v_s: Any
    v_h: Any
    o_b: Any
    o_h: Any
    o_s: Any


class Scores(NamedTuple):
    """What scores are multiplied by, and what they are held to where `Tile.CAPPED`."""

    scale: Any
    softcap: Any


class Tile(NamedTuple):
    """Constants. PAGE: keys in a block of the cache, 0 where a block is a sequence. D: the head dimension, BLOCK_D the
    power of two above it. SPLIT: are there several shares of a sequence?"""

    CAUSAL: Any
    WINDOWED: Any
    CAPPED: Any
    SPLIT: Any
    PAGE: Any
    D: Any
    BLOCK_D: Any
    BLOCK_M: Any
    BLOCK_N: Any
    DESCRIPTORS: Any


@triton.jit
def _blocks(table, batch, column, length, stride_t, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of the cache in which the keys from `column` on lie; one number where one block holds the whole tile.

    A contiguous cache is one block a sequence.
    """
    if PAGE == 0:
        blocks = batch
    elif PAGE % BLOCK_N == 0:
        blocks = tl.load(table + batch.to(tl.int64) * stride_t + column // PAGE, mask=column < length, other=0)
    else:
        keys = column + tl.arange(0, BLOCK_N)
        blocks = tl.load(table + batch.to(tl.int64) * stride_t + keys // PAGE, mask=keys < length, other=0)
    return blocks


@triton.jit
def _load(cache, head, blocks, column, length, stride_b, stride_s, stride_h, tile, MASKED: tl.constexpr):
    """The keys or values from `column` on, [BLOCK_N, BLOCK_D]; zeros, if `MASKED`, from `length` on."""
    rows, d = tl.arange(0, tile.BLOCK_N), tl.arange(0, tile.BLOCK_D)
    if tile.DESCRIPTORS:
        if tile.PAGE == 0:
            loaded = cache.load([blocks, head, column, 0]).reshape(tile.BLOCK_N, tile.BLOCK_D)
        else:
            loaded = cache.load([blocks, column % tile.PAGE, head, 0]).reshape(tile.BLOCK_N, tile.BLOCK_D)
        if MASKED:  # the hardware knows the end of the cache, not of the sequence
            loaded = tl.where(rows[:, None] < length - column, loaded, 0.0)
    else:
        base = cache + head.to(tl.int64) * stride_h
        if tile.PAGE % tile.BLOCK_N == 0:
            # The row goes into the 64-bit base, so that addresses inside a tile need 32 bits.
            row = column if tile.PAGE == 0 else column % tile.PAGE
            base += blocks.to(tl.int64) * stride_b + row.to(tl.int64) * stride_s
            at = base + (rows[:, None] * stride_s + d[None, :])
        else:
            within = (column + rows) % tile.PAGE
            at = base + (blocks.to(tl.int64) * stride_b + within.to(tl.int64) * stride_s)[:, None] + d[None, :]
        if MASKED:
            loaded = tl.load(at, mask=(rows[:, None] < length - column) & (d[None, :] < tile.D), other=0.0)
        elif tile.D < tile.BLOCK_D:
            loaded = tl.load(at, mask=d[None, :] < tile.D, other=0.0)
        else:
            loaded = tl.load(at)
    return loaded


@triton.jit
def _attend(
    acc, weight, peak, q, k, v, table, batch, head, first, last, position, length, window, scores, steps, stride_t,
    tile, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys `first` … `last`, in whole tiles: the running Σ p v, Σ p and maximum of each row, in powers of two."""
    scale, softcap = scores.scale, scores.softcap
    blocks = _blocks(table, batch, first, length, stride_t, tile.PAGE, tile.BLOCK_N)
    for column in tl.range(first, last, tile.BLOCK_N, num_stages=1 if MASKED else None):  # masked, there is one at most
        column = tl.multiple_of(column, tile.BLOCK_N)
        k_tile = _load(k, head, blocks, column, length, steps.k_b, steps.k_s, steps.k_h, tile, MASKED)
        s = tl.dot(q, tl.trans(k_tile))
        if tile.CAPPED:
            # softcap · tanh(scale · s / softcap); this form of tanh is right at both ends.
            s = (softcap - 2.0 * softcap / (1.0 + tl.exp2(s * (2.0 * scale / softcap * LOG2E)))) * LOG2E
        else:
            s = s * (scale * LOG2E)
        if MASKED or tile.CAUSAL or tile.WINDOWED:
            columns = (column + tl.arange(0, tile.BLOCK_N))[None, :]
            keep = columns < length
            if tile.CAUSAL:
                keep &= columns <= position[:, None]
            if tile.WINDOWED:
                keep &= columns > position[:, None] - window
            s = tl.where(keep, s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        anchor = higher
        if tile.CAUSAL or tile.WINDOWED:  # a row may see no key of the tile
            anchor = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s - anchor[:, None])
        decay = tl.exp2(peak - anchor)
        acc = acc * decay[:, None]
        v_tile = _load(v, head, blocks, column, length, steps.v_b, steps.v_s, steps.v_h, tile, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
        weight = weight * decay + tl.sum(p, 1)
        peak = higher
        # A tile ahead: loads whose addresses wait for another load are not pipelined.
        blocks = _blocks(table, batch, column + tile.BLOCK_N, length, stride_t, tile.PAGE, tile.BLOCK_N)
    return acc, weight, peak


@triton.jit(do_not_specialize=["stride_t", "heads_kv", "group", "n_q", "n_k", "n_rows", "splits", "window"])
def decode_kernel(
    q, k, v, lengths, table, o, lse, steps, stride_t, heads_kv, group, n_q, n_k, n_rows, splits, scores, window, tile,
):  # fmt: skip
    """One of `splits` equal shares of a sequence's keys, for BLOCK_M of the rows that share a key/value head.

    Writes o and lse; if SPLIT, the share's, (splits, n_rows, D) and (splits, n_rows) in fp32, n_rows = B · H · S.
    """
    # Blocks of rows read the same keys, and heads neighbouring ones: programs side by side share them in L2.
    per_head = group * n_q
    blocks = tl.cdiv(per_head, tile.BLOCK_M)
    program = tl.program_id(0)
    row = program % blocks * tile.BLOCK_M + tl.arange(0, tile.BLOCK_M)
    pair = program // blocks
    head, pair = pair % heads_kv, pair // heads_kv
    split, batch = pair % splits, pair // splits

    length = n_k
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), n_k)
    start = 0
    if tile.WINDOWED:
        start = tl.maximum(length - n_q + 1 - window, 0) // tile.BLOCK_N * tile.BLOCK_N
    share = tl.cdiv(tl.cdiv(length - start, tile.BLOCK_N), splits) * tile.BLOCK_N
    first = start + split * share
    last = tl.minimum(first + share, length)
    whole = first + tl.maximum(last - first, 0) // tile.BLOCK_N * tile.BLOCK_N  # keys before this one need no mask

    d = tl.arange(0, tile.BLOCK_D)
    inside = (row < per_head)[:, None] & (d < tile.D)[None, :]
    q_head, q_row = head * group + row // n_q, row % n_q
    q_at = batch.to(tl.int64) * steps.q_b + q_head.to(tl.int64) * steps.q_h + q_row * steps.q_s
    q_tile = tl.load(q + q_at[:, None] + d[None, :], mask=inside, other=0.0)
    position = length - n_q + q_row
    acc = tl.zeros([tile.BLOCK_M, tile.BLOCK_D], dtype=tl.float32)
    weight = tl.zeros([tile.BLOCK_M], dtype=tl.float32)
    peak = tl.full([tile.BLOCK_M], -float("inf"), dtype=tl.float32)
    acc, weight, peak = _attend(
        acc, weight, peak, q_tile, k, v, table, batch, head, first, whole, position, length, window, scores, steps,
        stride_t, tile, False,
    )  # fmt: skip
    acc, weight, peak = _attend(
        acc, weight, peak, q_tile, k, v, table, batch, head, whole, last, position, length, window, scores, steps,
        stride_t, tile, True,
    )  # fmt: skip

    total = tl.where(weight > 0, weight, 1.0)  # where no key was seen, o is 0 and lse is -infinity
    acc = acc / total[:, None]
    flat = (batch.to(tl.int64) * heads_kv + head) * per_head + row
    if tile.SPLIT:
        flat += split.to(tl.int64) * n_rows
        if first < last:  # else the merger does not read it: its lse says so
            tl.store(o + flat[:, None] * tile.D + d[None, :], acc, mask=inside)
    else:
        o_at = batch.to(tl.int64) * steps.o_b + q_head.to(tl.int64) * steps.o_h + q_row * steps.o_s
        tl.store(o + o_at[:, None] + d[None, :], acc.to(o.dtype.element_ty), mask=inside)
    tl.store(lse + flat, (peak + tl.log2(total)) * LN2, mask=row < per_head)


@triton.jit(do_not_specialize=["heads", "n_q", "n_rows", "splits"])
def merge_kernel(
    part, part_lse, o, lse, stride_ob, stride_oh, stride_os, heads, n_q, n_rows, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One row of o and lse from its `splits` ≤ MOST shares, weighted by exp(their lse)."""
    row = tl.program_id(0)
    s, d = tl.arange(0, MOST), tl.arange(0, BLOCK_D)
    at = s.to(tl.int64) * n_rows + row
    share = tl.load(part_lse + at, mask=s < splits, other=-float("inf"))
    top = tl.max(share, 0)
    seen = share > -float("inf")
    weight = tl.where(seen, tl.exp(share - tl.where(top > -float("inf"), top, 0.0)), 0.0)
    values = tl.load(part + at[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
    total = tl.sum(weight, 0)
    total = tl.where(total > 0, total, 1.0)
    batch, head, q_row = row // n_q // heads, row // n_q % heads, row % n_q
    o_at = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + q_row * stride_os
    mean = tl.sum(values * weight[:, None], 0) / total
    tl.store(o + o_at + d, mean.to(o.dtype.element_ty), mask=d < D)
    tl.store(lse + row, top + tl.log(total))
