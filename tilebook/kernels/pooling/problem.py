"""The problems that max pooling poses, and the suites to tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F

from tilebook import op
from tilebook.op import Cost
from tilebook.problem import UsageError, next_power_of_2
from tilebook.windows import PATTERN, Form, neighbours

TOKENIZERS = (
    "B8,C64,H112,k3x3s2x2p1x1", "B32,C64,H112,k3x3s2x2p1x1", "B128,C64,H112,k3x3s2x2p1x1",
    "B8,C384,H28,k3x3s2x2p1x1", "B32,C384,H28,k3x3s2x2p1x1", "B128,C384,H28,k3x3s2x2p1x1",
    "B128,C64,H32,k3x3s2x2p1x1", "B128,C64,H112,k3x3s2x2p1x1,last",
)  # fmt: skip
"""Of CCT-14/7x2 at 224 pixels and of CCT-7/3x2 at 32 (Hassani et al., 2021), and of what begins as ResNet does."""


def by_channels(x: torch.Tensor) -> bool:
    """Do the channels of (B, C, H, W) lie side by side?"""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def order(last: bool) -> torch.memory_format:
    """How such images lie in memory."""
    return torch.channels_last if last else torch.contiguous_format


def reaching(kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Of windows that reach into a cell of `stride` numbers the first, counted from the cell's own, and how many."""
    first, last = (padding - kernel) // stride + 1, (stride - 1 + padding) // stride
    return first, last - first + 1


@dataclass(frozen=True)
class Problem(op.Problem):
    """`batch` images of `channels`, `height` × `width`, of which windows take the largest number.

    Calls round their batch up to a power of two, so that one verdict serves a bucket.

    last: do channels lie side by side in memory (`torch.channels_last`)?
    """

    EXACT = frozenset({"channels", "height", "width"})

    dtype: str
    batch: int = op.size("B")
    channels: int = op.size("C")
    height: int = op.size("H")
    width: int = op.size("W", like="height")
    form: str = op.pattern(PATTERN, "k…x…s…x…p…x…")
    last: bool = op.flag()

    @property
    def shape(self) -> Form:
        return Form.read(self.form)

    @property
    def made(self) -> tuple[int, int]:
        """Height and width of what comes out."""
        return self.shape.made(self.height, self.width)

    @property
    def inner(self) -> int:
        """Channels that are counted together, as they lie side by side."""
        return self.channels if self.last else 1

    @property
    def cells(self) -> int:
        """That are counted together: of a plane, or of all channels where they lie side by side."""
        down, right = self.shape.stride
        return -(-self.height // down) * -(-self.width // right) * self.inner

    @property
    def asked(self) -> int:
        """How often a cell compares a number with a window."""
        kernel, stride, padding = self.shape
        windows = math.prod(reaching(*each)[1] for each in zip(kernel, stride, padding, strict=True))
        return windows * math.prod(stride)

    def check(self) -> None:
        kernel, stride, padding = self.shape
        if min(*kernel, *stride) < 1 or min(self.made) < 1:
            raise UsageError(f"no {self.form or 'k1x1'} fits into {self.height} × {self.width}")
        if any(2 * beside > size for beside, size in zip(padding, kernel, strict=True)):
            raise UsageError(f"{self.form}: windows of nothing but padding")

    @classmethod
    def of(cls, dy: torch.Tensor, indices: torch.Tensor, height: int, width: int, form: str) -> Self:
        batch, channels = dy.shape[:2]
        return cls(op.dtype_name(dy.dtype), next_power_of_2(batch), channels, height, width, form, by_channels(indices))

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        source = op.generator(device, seed)
        laid = order(self.last)
        shapes = (self.batch, self.channels, self.height, self.width), (self.batch, self.channels, *self.made)
        drawn = (op.normal(shape, source, device, torch.float32) for shape in shapes)
        x, dy = (each.to(self.torch_dtype, memory_format=laid) for each in drawn)
        _, indices = F.max_pool2d(x, *self.shape, return_indices=True)
        return dy, indices.contiguous(memory_format=laid), self.height, self.width, self.form

    def cost(self) -> Cost:
        planes = self.batch * self.channels
        given, made = planes * self.height * self.width, planes * self.made[0] * self.made[1]
        size = self.torch_dtype.itemsize
        return Cost(float(given), float(size * (given + made) + torch.int64.itemsize * made))

    def neighbours(self) -> Sequence[Self]:
        return neighbours(self)

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B2,C3,H9,k3x3s2x2p1x1", "bf16"), ("B2,C5,H8,W11,k3x3s2x2p1x1,last", "bf16"),
            ("B1,C4,H7,W10,k2x2s2x2p0x0", "fp16"), ("B3,C2,H11,W8,k5x2s3x1p2x0", "fp32"),
            ("B1,C16,H6,k3x3s1x1p1x1,last", "fp16"), ("B1,C1,H5,k2x3s4x3p0x1", "fp32"),
            ("B2,C3,H13,W14,k3x3s2x2p1x1", "bf16"),
        )  # fmt: skip
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        return {"tokenizers": [cls.parse(text, "bf16") for text in TOKENIZERS]}
