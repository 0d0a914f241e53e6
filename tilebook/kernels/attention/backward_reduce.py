"""Attention's backward in five products instead of seven: the scores are made once, and dq is added up in memory.

A program holds a block of columns, as in the other design's dk/dv kernel, and also makes its part of dq, scale · ds k.
Every program of a head adds to the same rows of dq, in fp32 and in no fixed order: results do not repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook.device import Device
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.ops import attention_bwd
from tilebook.kernels.attention.problem import BackwardProblem
from tilebook.kernels.attention.reduce_kernels import (
    attention_bwd_finish,
    attention_bwd_prepare,
    attention_bwd_reduce,
)
from tilebook.kernels.attention.scores import options
from tilebook.kernels.attention.tiles import (
    addressable,
    asynchronous,
    crowded,
    describable,
    describe,
    like,
    oversized,
    rows_and_tiles,
    too_large,
)
from tilebook.launch import HOST_DESCRIPTORS_S, launch
from tilebook.op import Config, Cost, Space


def supports(problem: BackwardProblem) -> bool:
    """16-bit dtypes, head dimensions up to 128, and what a mask by place alone can say: full, causal, windows."""
    scored = problem.softcap or problem.bias or problem.alibi or problem.dropout
    narrow = problem.head_dim % 8 == 0 and 16 <= problem.head_dim <= 128
    return problem.dtype in ("bf16", "fp16") and narrow and not scored


def _reject(problem: BackwardProblem, config: Config, device: Device) -> str | None:
    rows, columns, warps, stages, heads, cap = (
        config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "HEADS", "MAXNREG")
    )
    if config["DESCRIPTORS"] and device.capability < 90:
        return "tensor descriptors need sm_90 or later"
    if config["DESCRIPTORS"] and problem.floor_s(device) < HOST_DESCRIPTORS_S:
        return "the GPU would wait for the host to make its tensor descriptors"
    if config["DESCRIPTORS"] and stages == 1:
        return "without a pipeline these accessed memory that is not theirs (on an H200, with Triton 3.6)"
    padded = problem.head_dim != problem.width and not config["DESCRIPTORS"]  # Triton pipelines no loads with two masks
    if device.capability == 90 and rows == 32 and (stages == 1 or padded):
        # ds then lies where do was, 64 bytes a row instead of 128, and what both of their wgmma descriptors are made of
        # is set at the end of the loop: its first step reads a register that nothing wrote.
        return "ptxas 12.8 (Triton 3.6) loses where ds lies in shared memory, and dq is wrong"
    if device.backend == "hip" and (stages > 2 or cap):
        return "more than 2 stages do not pay on AMD GPUs, and registers cannot be capped there"
    if heads > 1 and (not problem.causal or heads > problem.batch * problem.heads_kv):
        return "taking turns between heads only balances causal masks, over as many heads as there are"
    if config["TURNED"] and problem.limits != (None, None):
        return "with a mask, blocks of columns start in different rows as it is"
    if oversized(rows, problem.seq_q, 32) or oversized(columns, problem.seq_k, 64):
        return "a block is larger than the sequence"
    shared, threads = _shared(problem, config, device), device.warp_size * warps
    if cap and device.registers_per_sm // (cap * threads) <= device.registers_per_sm // (256 * threads):
        return "such a cap on registers lets no other program onto an SM"
    if too_large(shared, device):
        return too_large(shared, device)
    # Sums of dk and dv; then scores and their gradients, or dq, which comes when those are done but for one in 16 bits.
    width = problem.width
    tiles = 2 * columns * width + rows * max(2 * columns, width) + rows * columns // 2
    if not asynchronous(device):
        tiles += (rows + columns) * width  # operands pass through registers, two to one of these
    if cap and tiles > cap * threads:
        return f"{cap} registers a thread are fewer than its tiles alone need"
    return crowded(tiles, warps, device)


def _shared(problem: BackwardProblem, config: Config, device: Device) -> int:
    """Bytes of shared memory, as compiled kernels report them or a little more: k, v, a ring of q and do, ds and dq."""
    rows, columns, stages = (config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "num_stages"))
    width = problem.width * problem.torch_dtype.itemsize
    scores = rows * columns * problem.torch_dtype.itemsize
    if device.backend == "hip":
        return max(width * max(rows, columns), scores) + 2 * width * rows * (stages - 1) + 2 * columns * width
    if stages == 1:  # then dq takes the place of do and ds
        return (2 * columns + rows) * width + max(scores, 4 * rows * problem.width) + 1024
    sums = 4 * rows * problem.width if config["DESCRIPTORS"] else 0
    if device.capability >= 100:  # tcgen05 lets go of a tile one step later, and p and ds are in shared memory both
        stages, scores = stages + 1, 3 * scores
    return 2 * columns * width + stages * 2 * rows * (width + 4) + scores + sums


def _default(problem: BackwardProblem, device: Device) -> Config:
    """The first that fits of a few shapes; the widest blocks of columns add to dq the fewest times."""
    descriptors = device.capability >= 90 and problem.floor_s(device) >= HOST_DESCRIPTORS_S
    shapes = [(64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 2)] if asynchronous(device) and descriptors else []
    shapes += [(32, 64, 8, 2), (64, 64, 8, 2)] if device.backend == "cuda" else []
    shapes += [(32, 64, 8, 1)]
    axes = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
    rest = {"HEADS": 1, "TURNED": 0, "MAXNREG": 0}
    configs = [
        Config(dict(zip(axes, shape, strict=True)) | rest | {"DESCRIPTORS": int(descriptors and shape[3] > 1)})
        for shape in shapes
    ]
    return next((each for each in configs if _reject(problem, each, device) is None), configs[-1])


def _work(problem: BackwardProblem, config: Config) -> Cost:
    """Five products in whole blocks; each block of columns sweeps q and do, and reads and writes dq's sums."""
    rows, columns = config.number("BLOCK_M"), config.number("BLOCK_N")
    blocks = rows_and_tiles(problem.seq_q, problem.seq_k, rows, columns, *problem.limits)
    tiles, heads = sum(visited for _, visited in blocks), problem.batch * problem.heads
    width = problem.width * problem.torch_dtype.itemsize
    flops = 10.0 * heads * tiles * rows * columns * problem.width
    swept = heads * tiles * rows * (2 * width + 8 * problem.width)
    return Cost(flops, swept + problem.cost().bytes + 2 * 4 * problem.queries * (problem.width + 2))


SPACE = Space(
    axes={
        "BLOCK_M": (32, 64, 128),
        "BLOCK_N": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "HEADS": (1, 4),
        "DESCRIPTORS": (0, 1),
        "TURNED": (0, 1),
        "MAXNREG": (0, 168),
    },
    reject=_reject,
    default=_default,
    work=_work,
)


@attention_bwd.implementation(
    "triton_reduce",
    space=SPACE,
    supports=supports,
    deterministic=False,
    proven=lambda problem: False,  # right in the interpreter: only a verdict makes it serve
)
def _triton_reduce(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    do, q, k, v, o = (addressable(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    rows, columns = config.number("BLOCK_M"), config.number("BLOCK_N")
    given = options(form, (), q, k)
    optional = {name: given[name] for name in ("before", "after", "CAUSAL", "BANDED")}
    tile = {"D": given["D"], "WIDTH": given["WIDTH"], "BLOCK_M": rows}
    tiles = triton.cdiv(n_q, rows) * batch * heads
    dq, dk, dv = like(q), like(k), like(v)
    # dqᵀ of one block of rows after the other, each in one piece: what a program adds at once.
    sums = torch.empty((tiles * tile["D"], rows), dtype=torch.float32, device=q.device)
    statistics = torch.empty(2 * tiles * rows, dtype=torch.float32, device=q.device)
    descriptors = bool(config["DESCRIPTORS"]) and describable(do, q, k, v)
    loaded: tuple[Any, ...] = q, k, v, do, statistics, sums
    if descriptors:
        loaded = (
            *(describe(x, n) for x, n in ((q, rows), (k, columns), (v, columns), (do, rows))),
            TensorDescriptor(statistics, list(statistics.shape), [1], [rows]),
            TensorDescriptor(sums, list(sums.shape), list(sums.stride()), [tile["D"], rows]),
        )
    launch(
        attention_bwd_prepare,
        (tiles,),
        do,
        o,
        lse,
        statistics,
        sums,
        *(step for x in (do, o) for step in x.stride()[:3]),
        heads,
        n_q,
        **tile,
        num_warps=4,
    )
    capped = {"maxnreg": config["MAXNREG"]} if config["MAXNREG"] else {}
    launch(
        attention_bwd_reduce,
        (triton.cdiv(n_k, columns) * batch * heads_kv,),
        *loaded,
        dk,
        dv,
        *(step for x in (q, k, v, do, dk, dv) for step in x.stride()[:3]),
        batch * heads_kv,
        heads_kv,
        heads // heads_kv,
        n_q,
        n_k,
        scale,
        **optional,
        **tile,
        BLOCK_N=columns,
        HEADS=config["HEADS"],
        DESCRIPTORS=descriptors,
        TURNED=config["TURNED"],
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        **capped,
    )
    launch(attention_bwd_finish, (tiles,), sums, dq, *dq.stride()[:3], heads, n_q, scale, **tile, num_warps=4)
    return dq, dk, dv
