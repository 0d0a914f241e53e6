"""The problems that norms over the last axis pose, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton

from tilebook import models, op
from tilebook.op import Cost


@dataclass(frozen=True)
class Problem(op.Problem):
    """`rows` vectors of `width`; calls round their rows up to a power of two, so that one verdict serves a bucket."""

    EXACT = frozenset({"width"})

    dtype: str
    rows: int = op.size("M")
    width: int = op.size("N")

    @classmethod
    def of(cls, *args: Any) -> Self:
        x = args[0]
        return cls(op.dtype_name(x.dtype), triton.next_power_of_2(x.shape[0]), x.shape[1])

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        x, weight = self._random(device, seed, (self.rows, self.width), (self.width,))
        return x, weight, 1e-6

    def cost(self) -> Cost:
        # x read, y written; the weight; rstd written in fp32.
        itemsize, elements = self.torch_dtype.itemsize, self.rows * self.width
        return Cost(4.0 * elements, float(itemsize * (2 * elements + self.width) + 4 * self.rows))

    def neighbours(self) -> Sequence[Self]:
        more = min(max(1024, 2 * self.rows), (1 << 26) // self.width)  # cheap, and yet more than any GPU runs at once
        rows = [333, 1, *([more] if more > self.rows else [])]
        return [dataclasses.replace(self, rows=each) for each in rows if each != self.rows]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("M64,N128", "bf16"),
            ("M17,N100", "fp16"),
            ("M1,N1024", "bf16"),
            ("M5,N1500", "fp32"),
            ("M2,N1", "fp32"),
            ("M100,N24", "bf16"),
            ("M3,N4097", "fp16"),
            ("M33,N64", "fp32"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        norms = [cls.parse(f"M8192,N{width}", "bf16") for width in (1024, 4096, 16384)]
        return {"norms": norms, "models": [cls.parse(*each) for each in models.shapes("norms")]}

    def _random(self, device: torch.device | str, seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        source = op.generator(device, seed)
        return [op.normal(shape, source, device, torch.float32).to(self.torch_dtype) for shape in shapes]


@dataclass(frozen=True)
class BackwardProblem(Problem):
    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        shape = (self.rows, self.width)
        dy, x, weight = self._random(device, seed, shape, shape, (self.width,))
        scale = torch.empty(self.rows, device=device) if x.is_meta else rstd(x.float(), 1e-6)
        return dy, x, weight, scale

    def cost(self) -> Cost:
        # dy and x read, dx written; the weight read, its gradient written; rstd read in fp32.
        itemsize, elements = self.torch_dtype.itemsize, self.rows * self.width
        return Cost(10.0 * elements, float(itemsize * (3 * elements + 2 * self.width) + 4 * self.rows))


def rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / √(mean(x²) + eps) of each row."""
    return torch.rsqrt(x.square().mean(-1) + eps)
