"""The problems that biases of linear layers pose, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import op
from tilebook.op import Cost
from tilebook.problem import next_power_of_2

LAYERS = (
    "M32768,N384", "M32768,N1152", "M16384,N768", "M16384,N2304", "M16384,N3072", "M32768,N768", "M32768,N3072",
    "M4096,N768", "M4096,N3072", "M2048,N1152",
)  # fmt: skip
"""Of CCT-14 × 128 and × 8, ViT-B/16 × 64, DistilBERT 64 × 512 and 16 × 256."""


@dataclass(frozen=True)
class Problem(op.Problem):
    """`rows` of `width` numbers; calls round their rows up to a power of two, so that one verdict serves a bucket."""

    EXACT = frozenset({"width"})
    TRANSFER = 0.9

    dtype: str
    rows: int = op.size("M")
    width: int = op.size("N")

    @classmethod
    def of(cls, dy: torch.Tensor) -> Self:
        return cls(op.dtype_name(dy.dtype), next_power_of_2(dy.shape[0]), dy.shape[1])

    def like(self, measured: op.Problem) -> bool:
        """Sums of enough numbers that starting them is little of their time, and of no more: the lead shrinks."""
        if not isinstance(measured, Problem) or measured.dtype != self.dtype:
            return False
        if self.rows * self.width > measured.rows * measured.width:
            return False
        return all(each.rows >= 4096 and 384 <= each.width <= 4096 and not each.width % 64 for each in (self, measured))

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        drawn = op.normal((self.rows, self.width), op.generator(device, seed), device, torch.float32)
        return (drawn.to(self.torch_dtype),)

    def cost(self) -> Cost:
        numbers = float(self.rows * self.width)
        return Cost(numbers, self.torch_dtype.itemsize * (numbers + self.width))

    def neighbours(self) -> Sequence[Self]:
        return [dataclasses.replace(self, rows=each) for each in (333, 1) if each != self.rows]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (("M64,N128", "bf16"), ("M17,N100", "fp16"), ("M1,N24", "bf16"), ("M300,N40", "bf16"))
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        return {"biases": [cls.parse(text, "bf16") for text in LAYERS]}
