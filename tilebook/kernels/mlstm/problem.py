"""The problems that mLSTM poses, and the suites to tune. Backward they are those of linear attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import op
from tilebook.kernels.linear_attention.problem import LinearAttention
from tilebook.op import Cost, UsageError


@dataclass(frozen=True)
class Problem(LinearAttention):
    """q, k, v, log-decays, floor, initial_state, scale, eps → o, state, den. Decays and a divisor are always there."""

    PRODUCTS = 4

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, floor: torch.Tensor,
        initial_state: torch.Tensor | None, scale: float, eps: float,
    ) -> Self:  # fmt: skip
        return cls.posed(q, v, True, initial_state is not None, True, "none")

    def check(self) -> None:
        super().check()
        if not (self.decay and self.normalized and self.feature_map == "none"):
            raise UsageError("mLSTM has decays and a divisor, and no feature map: write …,decay,normalized")

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        source = op.generator(device, seed)
        q, k, v = self.normal(source, device, self.head_dim, self.head_dim, self.value_dim)
        g, floor = self.decays(source, device), op.normal(q.shape[:3], source, device, torch.float32)
        state = self.start(source, device, 1) if self.initial else None
        return q, k, v, g, floor if floor.is_meta else floor.abs() + 0.1, state, self.head_dim**-0.5, 0.0

    def cost(self) -> Cost:
        """A token's place in the state, and what it reads there."""
        states = 4 * self.states * (1 + self.initial)
        return Cost(self.flops(), float(self.moved(2, 2) + 12 * self.tokens + states))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B1,H2,S70,D32", "bf16"),
            ("B1,H1,S40,D64,V32,initial", "fp16"),
            ("B2,H1,S37,D16,initial", "fp32"),
            ("B1,H1,S1,D24,V40", "bf16"),
        )
        return [cls.parse(f"{text},decay,normalized", dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        shapes = [f"B8,H8,S{n},D{d},decay,normalized" for d in (64, 128) for n in (2048, 8192)]
        return {"gated": [cls.parse(shape, "bf16") for shape in shapes]}
