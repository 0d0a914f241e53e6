"""The MLP's gradients once dz is known, in one launch: dx = dz W1, dW1 = dzᵀ x, dW2 = dyᵀ h, and both biases' sums.

Each of the three products is too small to fill a GPU by itself at the sizes of small transformers, and each sum is a
launch more; side by side they share its SMs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from tilebook import op
from tilebook.device import Device
from tilebook.kernels.mlp.form import ACTIVATIONS
from tilebook.kernels.mlp.kernels import _product, _store
from tilebook.kernels.mlp.problem import Problem
from tilebook.kernels.mlp.products import fused, rows_of
from tilebook.launch import launch
from tilebook.op import Config, Cost, Space

MOST_FLOPS = 1e11
"""Beyond this each product fills a GPU by itself, and cuBLAS's are the faster ones."""


@dataclass(frozen=True)
class GradsProblem(Problem):
    """dy, x (M, H), h, dz (M, I) and w1 (I, H) → dx (M, H), dw1 (I, H), db1 (I,), dw2 (H, I), db2 (H,)."""

    def __post_init__(self) -> None:
        # dz has seen the activation already: whatever it was, one verdict serves.
        object.__setattr__(self, "activation", ACTIVATIONS[0])

    @classmethod
    def of(cls, dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor) -> GradsProblem:
        return cls(op.dtype_name(dy.dtype), dy.shape[0], dy.shape[1], h.shape[1])

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        wide, inner = (self.rows, self.width), (self.rows, self.inner)
        dy, h, dz, x, w1 = self._random(device, seed, wide, inner, inner, wide, (self.inner, self.width))
        return dy, h, dz, x if x.is_meta else x * self.width**0.5, w1

    def cost(self) -> Cost:
        m, width, inner = self.rows, self.width, self.inner
        moved = 3 * m * width + 2 * m * inner + 3 * width * inner + width + inner
        return Cost(6.0 * m * width * inner, float(self.torch_dtype.itemsize * moved))


def each_alone(
    dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], ...]:
    """What computes dx, dW1, db1, dW2, db2, for when only some of them are asked for."""
    return (
        lambda: torch.mm(dz, w1),
        lambda: torch.mm(dz.t(), x),
        lambda: dz.sum(0),
        lambda: torch.mm(dy.t(), h),
        lambda: dy.sum(0),
    )


@op.define("mlp_grads_bwd", GradsProblem, direction="bwd", fused=fused)
def mlp_grads_bwd(
    dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """dx = dz W1, dW1 = dzᵀ x, db1 = Σ dz, dW2 = dyᵀ h, db2 = Σ dy."""
    return tuple(make() for make in each_alone(dy, h, dz, x, w1))


def _tiles(problem: Problem, block_m: int, block_n: int) -> tuple[int, int, int]:
    """How many tiles dW1, dW2 and dx have."""
    m, width, inner = problem.rows, problem.width, problem.inner
    shapes = ((inner, width), (width, inner), (m, width))
    one, two, three = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n) for rows, columns in shapes)
    return one, two, three


def _reject(problem: Problem, config: Config, device: Device) -> str | None:
    block_m, block_n, block_k = (config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    warps, stages = config.number("num_warps"), config.number("num_stages")
    in_flight = stages if device.capability >= 90 else stages - 1
    shared = problem.torch_dtype.itemsize * in_flight * block_k * (block_m + block_n)
    accumulators = block_m * block_n // (device.warp_size * warps)
    if shared > device.shared_per_block:
        return f"{shared} bytes of tiles in flight, of {device.shared_per_block} shared memory"
    if accumulators >= 256:
        return f"{accumulators} accumulators a thread spill"
    if accumulators < 16:
        return f"{accumulators} accumulators a thread do not keep the tensor cores busy"
    widest = max(problem.width, problem.inner)
    for block, axis, extent in ((block_m, "M", widest), (block_n, "N", widest), (block_k, "K", widest)):
        if block > max(64, triton.next_power_of_2(extent)):
            return f"a block of {block} along {axis} is mostly padding for {extent} features"
    if 90 <= device.capability < 120 and block_k < 64:
        return "BLOCK_K below 64 leaves half of a 128-byte shared memory line empty"
    if device.backend == "hip" and stages > 2:
        return "more than two stages do not pay where loads go through registers"
    return None


def _default(problem: Problem, device: Device) -> Config:
    """The largest of three tiles that still gives every SM one."""
    for block_m, block_n in ((128, 128), (64, 128), (64, 64)):
        if sum(_tiles(problem, block_m, block_n)) >= device.sm_count and block_n <= 2 * problem.width:
            break
    if device.backend == "hip":
        block_k, stages = 32, 2
    elif device.shared_per_block >= 3 * 2 * 64 * (block_m + block_n) and device.capability >= 90:
        block_k, stages = 64, 3
    else:
        block_k, stages = 32, 3
    warps = 8 if block_m * block_n == 128 * 128 else 4
    return Config(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=8, num_warps=warps, num_stages=stages)


def _work(problem: Problem, config: Config) -> Cost:
    """Padded tiles; each reads its rows and columns of the operands anew, so what L2 serves counts as bytes too."""
    block_m, block_n, block_k = (config.number(axis) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    flops = moved = 0.0
    for tiles, length in zip(
        _tiles(problem, block_m, block_n), (problem.rows, problem.rows, problem.inner), strict=True
    ):
        depth = triton.cdiv(length, block_k) * block_k
        flops += 2.0 * tiles * block_m * block_n * depth
        moved += tiles * ((block_m + block_n) * depth + block_m * block_n)
    moved += problem.rows * (problem.width + problem.inner)
    return Cost(flops, moved * problem.torch_dtype.itemsize)


SPACE = Space(
    axes={
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "GROUP_M": (1, 8),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
    },
    reject=_reject,
    default=_default,
    work=_work,
)


@triton.jit
def _outer(
    a, b, out, lda, ldb, tile, R, C, K,
    EVEN_R: tl.constexpr, EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of out (R, C) = aᵀ b, for a (K, R) and b (K, C)."""
    across = tl.cdiv(C, BLOCK_N)
    r0, c0 = tile // across * BLOCK_M, tile % across * BLOCK_N
    depth = tl.arange(0, BLOCK_K)
    rows, columns = r0 + tl.arange(0, BLOCK_M), c0 + tl.arange(0, BLOCK_N)
    a_ptrs = a + depth[:, None].to(tl.int64) * lda + rows[None, :]
    b_ptrs = b + depth[:, None].to(tl.int64) * ldb + columns[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
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
        a_ptrs += BLOCK_K * lda
        b_ptrs += BLOCK_K * ldb
    _store(out, acc.to(out.dtype.element_ty), r0, c0, R, C, 0)


@triton.jit
def _column_sums(a, out, lda, c0, C, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
    dy, h, dz, x, w1, dx, dw1, db1, dw2, db2, ldy, ldx, ldw, M, WIDTH, INNER,
    EVEN_H: tl.constexpr, EVEN_I: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The longest tiles first: those of dW1 and dW2, which sum over all rows, then those of dx, then the bias sums.

    EVEN_H, EVEN_I: BLOCK_M and BLOCK_N divide WIDTH, INNER. EVEN_N: BLOCK_N divides WIDTH. EVEN_DEPTH: BLOCK_K, INNER.
    """
    pid = tl.program_id(0)
    n_w1 = tl.cdiv(INNER, BLOCK_M) * tl.cdiv(WIDTH, BLOCK_N)
    n_w2 = tl.cdiv(WIDTH, BLOCK_M) * tl.cdiv(INNER, BLOCK_N)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(WIDTH, BLOCK_N)
    n_x = tiles_m * tiles_n
    if pid < n_w1:
        _outer(dz, x, dw1, INNER, ldx, pid, INNER, WIDTH, M, EVEN_I, EVEN_H, BLOCK_M, BLOCK_N, BLOCK_K)
    elif pid < n_w1 + n_w2:
        _outer(dy, h, dw2, ldy, INNER, pid - n_w1, WIDTH, INNER, M, EVEN_H, EVEN_I, BLOCK_M, BLOCK_N, BLOCK_K)
    elif pid < n_w1 + n_w2 + n_x:
        tile = pid - n_w1 - n_w2
        first = tile // (GROUP_M * tiles_n) * GROUP_M
        height = tl.minimum(tiles_m - first, GROUP_M)
        inside = tile % (GROUP_M * tiles_n)
        m0, n0 = (first + inside % height) * BLOCK_M, (inside // height) * BLOCK_N
        acc = _product(
            dz, w1, INNER, ldw, m0, n0, M, WIDTH, INNER, True, EVEN_N, EVEN_DEPTH, 0, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
        _store(dx, acc.to(dx.dtype.element_ty), m0, n0, M, WIDTH, 0)
    else:
        c0 = (pid - n_w1 - n_w2 - n_x) * COLUMNS
        padded = tl.cdiv(INNER, COLUMNS) * COLUMNS
        if c0 < padded:
            _column_sums(dz, db1, INNER, c0, INNER, M, ROWS, COLUMNS)
        else:
            _column_sums(dy, db2, ldy, c0 - padded, WIDTH, M, ROWS, COLUMNS)


def supports(problem: Problem) -> bool:
    return problem.dtype in ("bf16", "fp16") and problem.cost().flops <= MOST_FLOPS


@mlp_grads_bwd.implementation("triton", space=SPACE, supports=supports)
def _triton(
    dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, *, config: Config
) -> tuple[torch.Tensor, ...]:
    dy, h, dz, x, w1 = rows_of(dy), h.contiguous(), dz.contiguous(), rows_of(x), rows_of(w1)
    (m, width), inner = dy.shape, h.shape[1]
    dx, dw1, db1 = x.new_empty(m, width), w1.new_empty(inner, width), dz.new_empty(inner)
    dw2, db2 = h.new_empty(width, inner), dy.new_empty(width)
    block_m, block_n, block_k = config.number("BLOCK_M"), config.number("BLOCK_N"), config.number("BLOCK_K")
    # The sums have as many accumulators a thread as leave room for loads in flight.
    columns = 64
    rows = 32 * 32 * config.number("num_warps") // columns
    tiles = triton.cdiv(inner, block_m) * triton.cdiv(width, block_n)
    tiles += triton.cdiv(width, block_m) * triton.cdiv(inner, block_n)
    tiles += triton.cdiv(m, block_m) * triton.cdiv(width, block_n)
    launch(
        grads_kernel,
        (tiles + triton.cdiv(inner, columns) + triton.cdiv(width, columns),),
        *(dy, h, dz, x, w1, dx, dw1, db1, dw2, db2),
        *(dy.stride(0), x.stride(0), w1.stride(0), m, width, inner),
        EVEN_H=width % block_m == 0 and width % block_n == 0,
        EVEN_I=inner % block_m == 0 and inner % block_n == 0,
        EVEN_DEPTH=inner % block_k == 0,
        EVEN_N=width % block_n == 0,
        ROWS=rows,
        COLUMNS=columns,
        **config,
    )
    return dx, dw1, db1, dw2, db2


mlp_grads_bwd.implementation("torch")(mlp_grads_bwd.reference)
