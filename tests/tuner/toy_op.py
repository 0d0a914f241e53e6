"""An op whose configs compile, fail, hang and crash as a test wishes. Imported by compile processes by name."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl

from tilebook import device as devices
from tilebook.launch import launch
from tilebook.op import Config, Cost, Problem, Space, define, size


@triton.jit
def scale_kernel(x, y, n, factor, BLOCK: tl.constexpr, UNUSED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    tl.store(y + at, value * factor, mask=at < n)


@triton.jit
def matmul_kernel(a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        acc = tl.dot(tl.load(a + rows[:, None] * K + inner), tl.load(b + inner[:, None] * N + columns), acc)
    tl.store(c + rows[:, None] * N + columns, acc.to(c.dtype.element_ty))


@triton.jit
def broken_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.no_such_function(BLOCK))


@triton.jit
def odd_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 0.0)


@dataclass(frozen=True)
class ToyProblem(Problem):
    n: int = size("N")
    dtype: str

    @classmethod
    def of(cls, *args: Any) -> Self:
        return cls(n=args[0].shape[0], dtype="bf16")

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        if self.n == 13:
            raise ValueError("thirteen rows cannot be made")
        return (torch.empty(self.n, self.n, dtype=self.torch_dtype, device=device),)

    def cost(self) -> Cost:
        return Cost(2 * self.n**3, 4 * self.n**2)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return ()


@define("toy", ToyProblem)
def toy(x: torch.Tensor) -> torch.Tensor:
    return x


def run(x: torch.Tensor, *, config: Config) -> torch.Tensor:
    y, n = torch.empty_like(x), x.shape[0]
    kind, block = config["kind"], config.number("block")
    options = {"num_warps": config.number("warps"), "num_stages": config.number("stages")}
    match kind:
        case "scale":
            grid = (triton.cdiv(n * n, block),)
            launch(scale_kernel, grid, x, y, n * n, 2.0, BLOCK=block, UNUSED=config.number("unused"), **options)
        case "persistent":
            grid = (devices.current().sm_count,)
            launch(scale_kernel, grid, x, y, n * n, 2.0, BLOCK=block, UNUSED=0, **options)
        case "other factor":
            grid = (triton.cdiv(n * n, block),)
            launch(scale_kernel, grid, x, y, n * n, 3.0, BLOCK=block, UNUSED=0, **options)
        case "matmul":
            grid = (triton.cdiv(n, block), triton.cdiv(n, block))
            launch(matmul_kernel, grid, x, x, y, n, n, BM=block, BN=block, BK=64, **options)
        case "broken":
            launch(broken_kernel, (1,), x, BLOCK=block, **options)
        case "odd":
            launch(odd_kernel, (1,), x, BLOCK=100, **options)
        case "hang":
            time.sleep(600)
        case "crash":
            os.abort()
        case "failed pass":  # as MLIR does it: the diagnostic, then a long reproducer, then an empty-handed exception
            print("kernel.py:3:4: error: operand #0 does not dominate this use\n" + "%0 = arith\n" * 10_000)
            raise RuntimeError("PassManager::run failed")
        case "raise":
            raise ValueError("the launcher objects")
    return y


toy.implementation("ours", space=Space({}, lambda *_: None, lambda *_: Config()))(run)
