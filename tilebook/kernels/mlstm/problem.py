"""The problems that mLSTM poses, and the suites to tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import bounds, op
from tilebook.kernels.linear_attention.problem import BackwardProblem as LinearBackward
from tilebook.kernels.linear_attention.problem import LinearAttention
from tilebook.op import Cost, UsageError


class _Memory:
    """What both directions have in common: decays and a divisor are always there."""

    @classmethod
    def examples(cls: Any) -> Any:
        texts = (
            ("B1,H2,S70,D32", "bf16"),
            ("B1,H1,S40,D64,V32,initial", "fp16"),
            ("B2,H1,S37,D16,initial", "fp32"),
            ("B1,H1,S1,D24,V40", "bf16"),
        )
        return [cls.parse(f"{text},decay,normalized", dtype) for text, dtype in texts]

    @classmethod
    def suites(cls: Any) -> Any:
        shapes = [f"B8,H8,S{n},D{d},decay,normalized" for d in (64, 128) for n in (2048, 8192)]
        return {"gated": [cls.parse(shape, "bf16") for shape in shapes]}

    def check(self: Any) -> None:
        bounds.linear_attention(self)
        if not (self.decay and self.normalized and self.feature_map == "none"):
            raise UsageError("mLSTM has decays and a divisor, and no feature map: write …,decay,normalized")

    def made(self: Any, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """q, k, v, log-decays, what is written, a state, and a source of more."""
        source = op.generator(device, seed)
        q, k, v = self.normal(source, device, self.head_dim, self.head_dim, self.value_dim)
        g, log_input = (self.decays(source, device) for _ in range(2))
        state = self.start(source, device, 1) if self.initial else None
        return q, k, v, g, log_input, state, source


@dataclass(frozen=True)
class Problem(_Memory, LinearAttention):
    """q, k, v, log-decays, log_input, floor, initial_state, scale, eps → o, state, den."""

    PRODUCTS = 4

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, log_input: torch.Tensor,
        floor: torch.Tensor, initial_state: torch.Tensor | None, scale: float, eps: float,
    ) -> Self:  # fmt: skip
        return cls.posed(q, v, True, initial_state is not None, True, "none")

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, state, source = self.made(device, seed)
        floor = op.normal(tensors[3].shape, source, device, torch.float32)
        return *tensors, floor if floor.is_meta else floor.abs() + 1, state, self.head_dim**-0.5, 0.0

    def cost(self) -> Cost:
        """A token's place in the state, and what it reads there."""
        return Cost(self.flops(), float(self.moved(2, 2) + 16 * self.tokens + 4 * self.states * (1 + self.initial)))


@dataclass(frozen=True)
class BackwardProblem(_Memory, LinearBackward):
    """do, dstate, q, k, v, log-decays, log_input, initial_state, weight, scale → gradients of q … initial_state.

    do and weight are the gradients of sums of values and of weights, before the one is divided by the other.
    """

    @classmethod
    def of(  # type: ignore[override]
        cls, do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        log_decay: torch.Tensor, log_input: torch.Tensor, initial_state: torch.Tensor | None, weight: torch.Tensor,
        scale: float,
    ) -> Self:  # fmt: skip
        return cls.posed(q, v, True, dstate is not None or initial_state is not None, True, "none")

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, state, source = self.made(device, seed)
        do = op.normal(tensors[2].shape, source, device, self.torch_dtype)
        dstate = self.start(source, device, 1) if self.initial else None
        weight = op.normal(tensors[3].shape, source, device, torch.float32)
        return do, dstate, *tensors, state, weight, self.head_dim**-0.5
