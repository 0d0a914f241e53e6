"""o = softmax(scale · q kᵀ) v and each row's log-sum-exp, in one pass over k and v (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tilebook.device import Device
from tilebook.kernels.attention import eager
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.problem import ForwardProblem
from tilebook.kernels.attention.scores import (
    columns_seen,
    looked_up,
    options,
    scored,
    survives,
    within,
)
from tilebook.kernels.attention.tiles import (
    LN2,
    LOG2E,
    addressable,
    asynchronous,
    crowded,
    describable,
    describe,
    like,
    load_tile,
    offset,
    oversized,
    place,
    rows_and_tiles,
    store_tile,
    too_large,
)
from tilebook.launch import HOST_DESCRIPTORS_S, launch
from tilebook.op import DTYPES, Config, Cost, Space, define


@define("attention_fwd", ForwardProblem)
def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, H, Sq, D), k and v (B, Hkv, Sk, D) → o (B, H, Sq, D), lse (B, H, Sq) in fp32, natural log. scale > 0.

    extras: what the form asks for: bias, slopes, seed. A row that sees nothing is 0, and its lse -inf.
    """
    return eager.forward(q, k, v, form, scale, *extras)


def supports(problem: ForwardProblem) -> bool:
    widest = 128 if problem.exact else 256  # more does not fit into registers without tensor cores
    return problem.dtype in DTYPES and problem.head_dim % 8 == 0 and 16 <= problem.head_dim <= widest


def usual(problem: ForwardProblem) -> bool:
    """What is timed above all: plain attention in 16 bits, with a head dimension that needs no padding."""
    return problem.form.plain and problem.dtype in ("bf16", "fp16") and problem.head_dim == problem.width


def proven(problem: ForwardProblem) -> bool:
    """Seen right on an H200, and not where PyTorch may be faster: it has kernels for padded widths, masks and fp32."""
    return usual(problem) or (problem.dtype in ("bf16", "fp16") and problem.form.composed)


def _reject(problem: ForwardProblem, config: Config, device: Device) -> str | None:
    rows, columns, warps, stages, heads, descriptors = (
        config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "HEADS", "DESCRIPTORS")
    )
    if descriptors and device.capability < 90:
        return "tensor descriptors need sm_90 or later"
    if descriptors and problem.exact:
        return "products in full fp32 read their operands through registers"
    if descriptors and problem.floor_s(device) < HOST_DESCRIPTORS_S:
        return "the GPU would wait for the host to make its tensor descriptors"
    if device.backend == "hip" and stages > 2:
        return "more than 2 stages do not pay on AMD GPUs"
    if oversized(rows, problem.seq_q, 64) or oversized(columns, problem.seq_k, 32):
        return "a block is larger than the sequence"
    fewest = 4 if problem.exact else 16
    if rows < fewest * warps:
        return f"{warps} warps need a BLOCK_M of at least {fewest * warps}"
    if heads > 1 and (not problem.causal or heads > problem.batch * problem.heads):
        return "taking turns between heads only balances causal masks, over as many heads as there are"
    width = problem.width
    operand = 0 if asynchronous(device) else rows * width // 2  # q as two halves in a register
    scores = rows * columns * (1 + problem.companions)
    return too_large(_shared(problem, config, device), device) or crowded(
        rows * width + scores + operand, warps, device
    )


def _shared(problem: ForwardProblem, config: Config, device: Device) -> int:
    """Bytes of shared memory, as compiled kernels report them or a little more: q, and a ring of k and v tiles."""
    rows, columns, stages = (config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "num_stages"))
    ring = columns * (2 * stages if stages > 1 else 1)  # unpipelined, k is done with when v comes
    itemsize = problem.torch_dtype.itemsize
    width, scores = problem.width * itemsize, rows * columns * itemsize
    if device.backend == "hip":  # the newest tile of AMD's ring is on its way in registers
        return max(rows * width, columns * width, scores) + 2 * columns * width * (stages - 1)
    table = problem.table_itemsize * rows * columns * max(1, stages - 1)  # tiles of a bias or mask wait there too
    if not asynchronous(device):  # q moves on to registers, and its place is used again
        return max(rows + min(2, stages) * columns, ring) * width + scores + table
    barriers = 1024 if config["DESCRIPTORS"] else 0
    return (rows + ring) * width + barriers + table


def _default(problem: ForwardProblem, device: Device) -> Config:
    """The first that fits of a few good shapes: 128 rows where that gives every SM a block, else 64.

    On Hopper 64 rows and 4 warps, so that several programs share an SM and one's products hide another's softmax; with
    a causal mask narrower blocks, for the diagonal, and several heads at a time.
    """
    modern, width = asynchronous(device), problem.width
    stages = 3 if modern else 2
    shapes = [(64, 64, 4, stages), (64, 32, 4, 2), (64, 32, 4, 1)]
    if triton.cdiv(problem.seq_q, 128) * problem.batch * problem.heads >= device.sm_count:
        large = (128, 64, 4, stages) if width <= 64 else (128, 128 if width == 128 and modern else 64, 8, 2)
        shapes.insert(0, large)
    if problem.exact:  # operands live in registers too
        shapes = [(64, 32, 8 if width <= 64 else 16, 1)]
    axes = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
    descriptors = device.capability >= 90 and problem.floor_s(device) >= HOST_DESCRIPTORS_S and not problem.exact
    rest = {"HEADS": 1, "DESCRIPTORS": int(descriptors)}
    configs = [Config(dict(zip(axes, shape, strict=True)) | rest) for shape in shapes]
    if device.capability == 90 and descriptors and usual(problem) and width <= 128:
        shape = (64, 64, 4, 3) if problem.causal else (64, 128, 4, 2 if width <= 64 else 1)
        first = Config(dict(zip(axes, shape, strict=True)) | rest)
        configs[:0] = [first.replace(HEADS=4), first] if problem.causal else [first]
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: ForwardProblem, config: Config) -> Cost:
    """Every block of rows reads q once, and k and v up to its last unmasked column, in whole blocks."""
    rows, columns = config.number("BLOCK_M"), config.number("BLOCK_N")
    blocks = rows_and_tiles(problem.seq_q, problem.seq_k, rows, columns, *problem.limits)
    tiles, heads = sum(visited for _, visited in blocks), problem.batch * problem.heads
    width = problem.width * problem.torch_dtype.itemsize
    read = len(blocks) * rows * width + 2 * tiles * columns * width
    return Cost(4.0 * heads * tiles * rows * columns * problem.width, heads * read + problem.queries * (width + 4))


SPACE = Space(
    axes={
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (32, 64, 128, 256),
        "num_warps": (4, 8, 16),
        "num_stages": (1, 2, 3, 4),
        "HEADS": (1, 2, 4, 8),
        "DESCRIPTORS": (0, 1),
    },
    reject=_reject,
    default=_default,
    work=_work,
)


@triton.jit
def highest(s, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The maximum of each row. A thread's columns of a row are every eighth and its neighbour: maxima of those first
    are two short chains of instructions for a long one. Wide heads have no registers left for it."""
    if WIDTH <= 64:
        s = tl.max(tl.reshape(s, [BLOCK_M, BLOCK_N // 8, 8]), 1)
    return tl.max(s, 1)


@triton.jit
def attend(
    acc,
    weight,
    peak,
    q,
    k,
    v,
    batch,
    kv_head,
    pair,
    first,
    last,
    row,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    n_q,
    n_k,
    scale,
    extras,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    SCORED: tl.constexpr,
    GAPS: tl.constexpr,
    TF32: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Columns `first` … `last`, in whole blocks: the running Σ p v, Σ p and maximum of each row.

    `scale` brings scores to powers of two, and maxima are in them; where something is done to the scores themselves
    (`SCORED`) both are in natural units, and differences are taken first: biases may be huge. Up to 64 wide, Σ p is in
    eight parts a row, which meet when all is added up.
    """
    before, after, mask, _bias, base, stride_bm, stride_bn, _slope, _softcap, seed, dropout = extras
    for column in tl.range(first, last, BLOCK_N):
        column = tl.multiple_of(column, BLOCK_N)
        k_tile = load_tile(
            k, batch, kv_head, column, stride_kb, stride_kh, stride_ks, n_k, BLOCK_N, D, WIDTH, MASKED, DESCRIPTORS
        )
        s = tl.dot(q, tl.trans(k_tile), allow_tf32=TF32)
        if SCORED:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            s, _bent = scored(s, row, column, at_rows, at_columns, n_q, n_k, scale, extras)
        if MASKED:
            columns = column + tl.arange(0, BLOCK_N)
            keep = columns[None, :] < n_k
            if CAUSAL:
                keep &= (row + tl.arange(0, BLOCK_M))[:, None] >= columns[None, :]
            if BANDED:
                keep &= within((row + tl.arange(0, BLOCK_M))[:, None], columns[None, :], before, after)
            s = tl.where(keep, s, -float("inf"))
        if mask is not None:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            part = looked_up(mask + base, row, column, at_rows, at_columns, stride_bm, stride_bn, n_q, n_k)
            s = tl.where(part, s, -float("inf"))
        if SCORED:
            higher = tl.maximum(peak, highest(s, WIDTH, BLOCK_M, BLOCK_N))
            ground = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2((s - ground[:, None]) * LOG2E)
            decay = tl.exp2((peak - ground) * LOG2E)
        else:
            # Column 0 is visited first and no mask hides it, so the maximum is finite from then on; unless there are
            # gaps, and then the maximum of nothing must not meet itself: ∞ - ∞ is not 0.
            higher = tl.maximum(peak, highest(s, WIDTH, BLOCK_M, BLOCK_N) * scale)
            ground = higher
            if GAPS:
                ground = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(s * scale - ground[:, None])
            decay = tl.exp2(peak - ground)
        if WIDTH <= 64:
            total = tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // 8, 8]), 1)
        else:
            total = tl.sum(p, 1)
        if seed is not None:
            at_rows, at_columns = (row + tl.arange(0, BLOCK_M))[:, None], (column + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where(survives(at_rows, at_columns, pair, seed, dropout), p, 0.0)
        acc = acc * decay[:, None]
        v_tile = load_tile(
            v, batch, kv_head, column, stride_vb, stride_vh, stride_vs, n_k, BLOCK_N, D, WIDTH, MASKED, DESCRIPTORS
        )
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, allow_tf32=TF32)
        weight = weight * (decay[:, None] if WIDTH <= 64 else decay) + total
        peak = higher
    return acc, weight, peak


@triton.jit(do_not_specialize=["n_pairs", "n_heads", "group", "n_q", "n_k", "before", "after"])
def _attention_fwd(
    q,
    k,
    v,
    o,
    lse,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    n_pairs,
    n_heads,
    group,
    n_q,
    n_k,
    scale,
    before,
    after,
    mask,
    bias,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    slopes,
    stride_ab,
    stride_ah,
    softcap,
    seed,
    dropout,
    CAUSAL: tl.constexpr,
    BANDED: tl.constexpr,
    SCORED: tl.constexpr,
    GAPS: tl.constexpr,
    TF32: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    n_blocks = tl.cdiv(n_q, BLOCK_M)
    block, pair = place(tl.program_id(0), n_blocks, n_pairs, HEADS)
    if CAUSAL or (after is not None and before is None):
        block = n_blocks - 1 - block  # the last rows see the most columns: start with them
    batch, head = pair // n_heads, pair % n_heads
    kv_head = head // group
    row = block * BLOCK_M

    q_tile = load_tile(q, batch, head, row, stride_qb, stride_qh, stride_qs, n_q, BLOCK_M, D, WIDTH, True, DESCRIPTORS)
    acc = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    weight = tl.zeros([BLOCK_M, 8] if WIDTH <= 64 else [BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)

    last = n_k
    whole = n_k // BLOCK_N * BLOCK_N  # columns before this one need no mask
    if CAUSAL:
        last = tl.minimum(row + BLOCK_M, n_k)
        whole = tl.minimum(row + 1, n_k) // BLOCK_N * BLOCK_N
    if BANDED:
        first, clear, whole, last = columns_seen(row, BLOCK_M, n_k, before, after)
        first = first // BLOCK_N * BLOCK_N
        clear = tl.minimum(tl.cdiv(clear, BLOCK_N) * BLOCK_N, tl.cdiv(last, BLOCK_N) * BLOCK_N)
        whole = tl.maximum(whole // BLOCK_N * BLOCK_N, clear)
    factor = scale * LOG2E
    if SCORED:
        factor = scale
    if seed is not None:
        seed = tl.load(seed)
    extras = (
        before, after, mask, bias, None if stride_bb is None else offset(batch, head, stride_bb, stride_bh),
        stride_bm, stride_bn, None if slopes is None else tl.load(slopes + batch * stride_ab + head * stride_ah),
        softcap, seed, dropout,
    )  # fmt: skip
    if before is not None:
        acc, weight, peak = attend(
            acc, weight, peak, q_tile, k, v, batch, kv_head, pair, first, clear, row,
            stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
            True, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
        )  # fmt: skip
    acc, weight, peak = attend(
        acc, weight, peak, q_tile, k, v, batch, kv_head, pair, clear if BANDED else 0, whole, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
        False, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip
    acc, weight, peak = attend(
        acc, weight, peak, q_tile, k, v, batch, kv_head, pair, whole, last, row,
        stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs, n_q, n_k, factor, extras,
        True, CAUSAL, BANDED, SCORED, GAPS, TF32, D, WIDTH, BLOCK_M, BLOCK_N, DESCRIPTORS,
    )  # fmt: skip

    if WIDTH <= 64:
        weight = tl.sum(weight, 1)
    share = weight
    if GAPS:
        share = tl.where(weight == 0.0, 1.0, weight)  # a row that sees nothing is 0, and its log-sum-exp -inf
    if dropout is not None:
        share = share * (1.0 - dropout)
    store_tile(o, acc / share[:, None], batch, head, row, stride_ob, stride_oh, stride_os, n_q, BLOCK_M, D, WIDTH)
    rows = row + tl.arange(0, BLOCK_M)
    at = lse + pair.to(tl.int64) * n_q + rows
    total = peak + tl.log2(weight) * LN2 if SCORED else (peak + tl.log2(weight)) * LN2
    tl.store(at, total, mask=rows < n_q)


@attention_fwd.implementation("triton", space=SPACE, supports=supports, proven=proven)
def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    form: Form,
    scale: float,
    *extras: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = addressable(q), addressable(k), addressable(v)
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    o, lse = like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    rows, columns = config.number("BLOCK_M"), config.number("BLOCK_N")
    descriptors = bool(config["DESCRIPTORS"]) and describable(q, k, v)
    launch(
        _attention_fwd,
        (triton.cdiv(n_q, rows) * batch * heads,),
        *((describe(q, rows), describe(k, columns), describe(v, columns)) if descriptors else (q, k, v)),
        o,
        lse,
        *(step for x in (q, k, v, o) for step in x.stride()[:3]),
        batch * heads,
        heads,
        heads // heads_kv,
        n_q,
        n_k,
        scale,
        **options(form, extras, q, k),
        BLOCK_M=rows,
        BLOCK_N=columns,
        HEADS=config["HEADS"],
        DESCRIPTORS=descriptors,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return o, lse
