"""The problems that additions pose, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import op
from tilebook.inputs import DTYPES
from tilebook.op import Cost
from tilebook.problem import next_power_of_2

LINE = 1024
"""Numbers of a row, where the order in memory is that of both and rows are none of theirs."""
_LARGE = 1 << 21
_SMALLEST_TURNED = 64

RESIDUALS = (
    "B1,S4096,N1024,bf16", "B1,S16384,N1024,bf16", "B1,S32768,N1024,bf16",
    "B128,S196,N384,first,bf16", "B64,S197,N768,first,bf16", "B128,S196,N384,first,fp32", "B128,S196,N384,second,fp32",
)  # fmt: skip
"""Of DistilBERT 16 × 256 and 64 × 512, ViT-B/16 × 64 and CCT-14 × 128; x is of fp32."""


@dataclass(frozen=True)
class Problem(op.Problem):
    """x + y of `batch` times `rows` times `width` numbers, dtype and order of the sum those of x, or fp32.

    Calls round their batches up to a power of two, and so many numbers as lie in one order, as rows of 1024.

    dtype, other: of x and of y.
    lies: "first" or "second" where this one of (B, S, N) lies in memory as (B, N, S); "" where both lie in one order.
    """

    EXACT = frozenset({"width"})
    TRANSFER = 0.9

    dtype: str
    batch: int = op.size("B")
    rows: int = op.size("S")
    width: int = op.size("N")
    lies: str = op.choice("flat", "first", "second", elided=True)
    other: str = op.choice("fp32", "bf16", "fp16")

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> Self:
        names = op.dtype_name(x.dtype), op.dtype_name(y.dtype)
        if x.ndim == 1:
            return cls(names[0], 1, next_power_of_2(-(-x.numel() // LINE)), LINE, "flat", names[1])
        lies = "first" if x.stride(-1) != 1 else "second"
        return cls(names[0], next_power_of_2(x.shape[0]), x.shape[1], x.shape[2], lies, names[1])

    def like(self, measured: op.Problem) -> bool:
        """As many numbers that no GPU waits for work, and tiles that most of them fill; x + y as y + x in one order."""
        if not isinstance(measured, Problem) or self.lies != measured.lies:
            return False
        forms = [(each.dtype, each.other) for each in (self, measured)]
        alike = forms[0] == forms[1] or (self.lies == "flat" and forms[0] == forms[1][::-1])
        large = all(each.batch * each.rows * each.width >= _LARGE for each in (self, measured))
        return alike and large and min(self.rows, self.width) >= _SMALLEST_TURNED

    def neighbours(self) -> Sequence[Self]:
        if self.lies == "flat":
            return [dataclasses.replace(self, rows=each) for each in (1, self.rows + 3)]
        ragged = dataclasses.replace(self, batch=3, rows=self.rows + 1)
        return [ragged, dataclasses.replace(self, batch=1, rows=self.width, width=self.rows)]

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        source = op.generator(device, seed)
        flat = self.lies == "flat"
        shape = (self.batch * self.rows * self.width,) if flat else (self.batch, self.rows, self.width)
        found = []
        for dtype, turned in ((self.dtype, self.lies == "first"), (self.other, self.lies == "second")):
            drawn = op.normal(shape, source, device, torch.float32).to(DTYPES[dtype])
            found.append(drawn.mT.contiguous().mT if turned else drawn)
        return tuple(found)

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.promote_types(self.torch_dtype, DTYPES[self.other])

    def cost(self) -> Cost:
        numbers = float(self.batch * self.rows * self.width)
        sizes = self.torch_dtype.itemsize + DTYPES[self.other].itemsize + self.sum_dtype.itemsize
        return Cost(numbers, sizes * numbers)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B1,S2,N1024,bf16", "fp32"), ("B1,S1,N1024,fp16", "fp32"), ("B1,S4,N1024", "bf16"),
            ("B2,S40,N70,first,bf16", "fp32"), ("B3,S33,N64,second,fp16", "fp32"), ("B2,S64,N100,first", "fp32"),
            ("B1,S65,N31,second,bf16", "bf16"), ("B2,S17,N48,first", "fp16"),
        )  # fmt: skip
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        return {"residuals": [cls.parse(text, "fp32") for text in RESIDUALS]}
