"""o = softmax(scale · q kᵀ) v on Hopper by a kernel in Gluon, of which `kernels` says what it does better."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilebook.device import Device
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.gluon.kernels import attention_fwd_gluon
from tilebook.kernels.attention.layout import described, like
from tilebook.kernels.attention.ops import attention_fwd
from tilebook.kernels.attention.problem import ForwardProblem
from tilebook.launch import launch
from tilebook.occupancy import rows_and_tiles, too_large
from tilebook.op import Config, Cost, Space

LEAST_FLOPS = 2e10
"""Making four tensor descriptors costs the host 40 µs: a GPU that is done sooner would wait for them."""

_ROWS, _HEIGHT = 64, 128  # of a warpgroup, and of the two that share a tile


def supports(problem: ForwardProblem) -> bool:
    """The plain form in 16 bits at the two usual widths, and enough of it for four descriptors to be made meanwhile."""
    usual = problem.form.plain and problem.dtype in ("bf16", "fp16") and problem.head_dim in (64, 128)
    return usual and min(problem.seq_q, problem.seq_k) > 64 and problem.cost().flops >= LEAST_FLOPS


def available(device: Device) -> bool:
    """Hopper: its products (wgmma) are another generation's on later GPUs."""
    return device.backend == "cuda" and device.capability == 90


def _reject(problem: ForwardProblem, config: Config, device: Device) -> str | None:
    columns, stages, heads = (config.number(axis) for axis in ("BLOCK_N", "STAGES", "HEADS"))
    if heads > 1 and (not problem.causal or heads > problem.batch * problem.heads):
        return "taking turns between heads only balances causal masks, over as many heads as there are"
    # Two tiles of q, one of o, a ring of k and one of v, and barriers.
    return too_large((3 * _HEIGHT + 2 * columns * stages) * problem.head_dim * 2 + 512, device)


def _default(problem: ForwardProblem, device: Device) -> Config:
    return Config(BLOCK_N=128, STAGES=2, HEADS=1, TURNS=0, PERSISTENT=1)


def _work(problem: ForwardProblem, config: Config) -> Cost:
    """As in the other forward: every block of rows reads q once, and k and v up to its last unmasked column."""
    rows, columns = _HEIGHT, config.number("BLOCK_N")
    blocks = rows_and_tiles(problem.seq_q, problem.seq_k, rows, columns, *problem.limits)
    tiles, heads = sum(visited for _, visited in blocks), problem.batch * problem.heads
    read = (len(blocks) * rows + 2 * tiles * columns) * problem.head_dim * 2
    flops = 4.0 * heads * tiles * rows * columns * problem.head_dim
    return Cost(flops, heads * read + problem.queries * (problem.head_dim * 2 + 4))


SPACE = Space(
    axes={
        "BLOCK_N": (128,),
        "STAGES": (2, 3),
        "HEADS": (1, 2, 4, 8, 16, 32, 64),
        "TURNS": (0, 1),
        "PERSISTENT": (0, 1),
    },
    reject=_reject,
    default=_default,
    work=_work,
)


@attention_fwd.implementation("gluon", space=SPACE, available=available, supports=supports)
def _gluon(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = described(q), described(k), described(v)
    (batch, heads, n_q, width), (heads_kv, n_k) = q.shape, k.shape[1:3]
    o, lse = like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    columns = config.number("BLOCK_N")
    n_blocks = triton.cdiv(n_q, _HEIGHT)
    n_tiles = n_blocks * batch * heads
    programs = min(_sms(q.device), n_tiles) if config["PERSISTENT"] else n_tiles
    launch(
        attention_fwd_gluon,
        (programs,),
        _describe(q, _ROWS),
        _describe(k, columns),
        _describe(v, columns),
        _describe(o, _ROWS),
        lse,
        n_tiles,
        n_blocks,
        batch * heads,
        heads,
        heads // heads_kv,
        n_q,
        n_k,
        scale,
        D=width,
        BLOCK_N=columns,
        STAGES=config["STAGES"],
        HEADS=config["HEADS"],
        CAUSAL=form.causal,
        TURNS=bool(config["TURNS"]),
        num_warps=4,
    )
    return o, lse


def _describe(x: torch.Tensor, rows: int) -> Any:
    """A host-side descriptor whose blocks are `rows` rows of one head."""
    block = [1, 1, rows, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, _ELEMENTS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@functools.cache
def _sms(device: torch.device) -> int:
    """Multiprocessors of the GPU; without one there is nothing to fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
