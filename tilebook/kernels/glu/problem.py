"""The problems that gated linear units pose, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from tilebook import op
from tilebook.kernels.glu.form import ACTIVATIONS
from tilebook.op import Cost
from tilebook.problem import next_power_of_2

TRAINED = (
    "M8192,F8192", "M8192,F11008", "M8192,F14336", "M16384,F4864", "M16384,F8960", "M8192,F18944",
    "M8192,F9216,gelu_tanh", "M8192,F14336,gelu_tanh", "M16384,F1152,gelu,packed", "M8192,F8192,packed",
    "M8192,F17920,packed",
)  # fmt: skip
"""Of Llama-3.2 1B and 3B, Llama-2 7B, Llama-3 8B and Mistral, Qwen2 0.5B, 1.5B and 7B, Gemma-2 2B and 9B, ModernBERT,
Phi-3 mini, Phi-4."""


_WIDE, _MANY, _APART = 2048, 1 << 24, 4.0
"""Features, and numbers in all, from which on a gate is like another, and how far apart they may be."""


@dataclass(frozen=True)
class Glu(op.Problem):
    """`rows` vectors of `width`; calls round their rows up to a power of two, so that one verdict serves a bucket.

    packed: one tensor holds gate and up, side by side, and one their gradients.
    """

    EXACT = frozenset({"width"})
    MOVED: ClassVar[int]
    """Tensors of h's size that are read or written."""
    FLOPS: ClassVar[float]
    """For each number of h."""

    dtype: str
    rows: int = op.size("M")
    width: int = op.size("F")
    activation: str = op.choice(*ACTIVATIONS)
    packed: bool = op.flag(elided=True)

    @classmethod
    def posed(cls, gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> Self:
        width = gate.shape[1] if up is not None else gate.shape[1] // 2
        return cls(op.dtype_name(gate.dtype), next_power_of_2(gate.shape[0]), width, activation, up is None)

    def like(self, measured: op.Problem) -> bool:
        """Rows of many whole blocks, and so many numbers that no GPU waits for work."""
        if not isinstance(measured, Glu) or type(measured) is not type(self):
            return False
        forms = [(each.dtype, each.activation, each.packed) for each in (self, measured)]
        least, numbers = min(self.width, measured.width), min(self.rows * self.width, measured.rows * measured.width)
        large = least >= _WIDE and not self.width % 16 and numbers >= _MANY
        return forms[0] == forms[1] and large and self.apart(measured) <= _APART

    def neighbours(self) -> Sequence[Self]:
        more = min(max(1024, 2 * self.rows), (1 << 26) // self.width)  # cheap, and yet more than any GPU runs at once
        rows = [333, 1, *([more] if more > self.rows else [])]
        return [dataclasses.replace(self, rows=each) for each in rows if each != self.rows]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("M64,F128", "bf16"),
            ("M17,F100,gelu_tanh", "fp16"),
            ("M1,F1024,gelu", "bf16"),
            ("M5,F1500", "fp32"),
            ("M2,F1,gelu", "fp32"),
            ("M100,F24,packed", "bf16"),
            ("M3,F4097,gelu_tanh,packed", "fp16"),
            ("M33,F65,gelu,packed", "fp32"),
            ("M9,F136,gelu", "bf16"),
            ("M7,F1111,gelu_tanh", "fp32"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        return {"training": [cls.parse(text, "bf16") for text in TRAINED]}

    def drawn(self, device: torch.device | str, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Random gate and up (M, F), or one tensor (M, 2F) for both and None."""
        source, shape = op.generator(device, seed), (self.rows, self.width * (1 + self.packed))
        gate, *up = (
            op.normal(shape, source, device, torch.float32).to(self.torch_dtype) for _ in range(2 - self.packed)
        )
        return gate, up[0] if up else None

    def cost(self) -> Cost:
        numbers = float(self.rows * self.width)
        return Cost(self.FLOPS * numbers, self.MOVED * self.torch_dtype.itemsize * numbers)


@dataclass(frozen=True)
class Problem(Glu):
    """gate, up, activation → h."""

    MOVED = 3
    FLOPS = 5.0

    @classmethod
    def of(cls, gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> Self:
        return cls.posed(gate, up, activation)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        return *self.drawn(device, seed), self.activation


@dataclass(frozen=True)
class BackwardProblem(Glu):
    """dh, gate, up, activation, again → dgate, dup, and h if `again`, as it is wherever this is measured."""

    TRANSFER = 0.8
    MOVED = 6
    FLOPS = 12.0

    @classmethod
    def of(cls, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, again: bool) -> Self:
        return cls.posed(gate, up, activation)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        dh = op.normal((self.rows, self.width), op.generator(device, seed + 1), device, torch.float32)
        return dh.to(self.torch_dtype), *self.drawn(device, seed), self.activation, True
