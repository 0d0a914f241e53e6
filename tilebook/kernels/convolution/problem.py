"""The problems that convolutions in front of transformers pose, and the suites to tune."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import op
from tilebook.op import Cost
from tilebook.problem import UsageError, next_power_of_2
from tilebook.windows import PATTERN, Form, neighbours

TOKENIZERS = (
    "B8,C64,O384,H56,k7x7s2x2p3x3", "B32,C64,O384,H56,k7x7s2x2p3x3", "B64,C64,O384,H56,k7x7s2x2p3x3",
    "B128,C64,O384,H56,k7x7s2x2p3x3", "B256,C64,O384,H56,k7x7s2x2p3x3", "B128,C64,O256,H16,k3x3s1x1p1x1",
)  # fmt: skip
"""Second layers of the tokenizers of CCT-14/7x2 at 224 pixels and of CCT-7/3x2 at 32 (Hassani et al., 2021)."""


@dataclass(frozen=True)
class Problem(op.Problem):
    """`batch` images of `inputs` channels, `height` × `width`, and `outputs` channels of what comes out.

    Calls round their batch up to a power of two, so that one verdict serves a bucket.
    """

    EXACT = frozenset({"channels", "outputs", "height", "width"})

    dtype: str
    batch: int = op.size("B")
    channels: int = op.size("C")
    outputs: int = op.size("O")
    height: int = op.size("H")
    width: int = op.size("W", like="height")
    form: str = op.pattern(PATTERN, "k…x…s…x…p…x…")

    @property
    def shape(self) -> Form:
        return Form.read(self.form)

    @functools.cached_property
    def made(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return self.shape.made(self.height, self.width)

    @property
    def taps(self) -> int:
        return self.shape.kernel[0] * self.shape.kernel[1]

    @property
    def positions(self) -> int:
        """That are summed over."""
        return self.batch * self.made[0] * self.made[1]

    def check(self) -> None:
        if min(*self.shape.kernel, *self.shape.stride) < 1 or min(self.made) < 1:
            raise UsageError(f"no {self.form or 'k1x1'} fits into {self.height} × {self.width}")

    @classmethod
    def of(cls, dy: torch.Tensor, x: torch.Tensor, form: str) -> Self:
        batch, inputs, height, width = x.shape
        return cls(op.dtype_name(x.dtype), next_power_of_2(batch), inputs, dy.shape[1], height, width, form)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        source = op.generator(device, seed)
        shapes = (self.batch, self.outputs, *self.made), (self.batch, self.channels, self.height, self.width)
        dy, x = (op.normal(shape, source, device, torch.float32).to(self.torch_dtype) for shape in shapes)
        return dy, x, self.form

    def cost(self) -> Cost:
        read = self.batch * self.channels * self.height * self.width + self.positions * self.outputs
        written = self.outputs * self.channels * self.taps
        return Cost(2.0 * self.positions * written, float(self.torch_dtype.itemsize * (read + written)))

    def neighbours(self) -> Sequence[Self]:
        return neighbours(self)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B2,C16,O32,H9,k3x3s2x2p1x1", "bf16"),
            ("B1,C24,O16,H7,W10,k3x3s1x1p0x2", "fp16"),
            ("B3,C16,O48,H11,W8,k5x2s3x1p2x0", "bf16"),
            ("B1,C64,O24,H5,k1x1s1x1p0x0", "fp16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        return {"tokenizers": [cls.parse(text, "bf16") for text in TOKENIZERS]}
