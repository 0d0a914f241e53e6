"""The problems that linear attention with decays by channel poses, and the suites to tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import op
from tilebook.kernels.linear_attention.recurrent import Recurrent
from tilebook.op import Cost


@dataclass(frozen=True)
class ChannelDecay(Recurrent):
    """q, k and log-decays (B, H, S, D), v (B, H, S, V).

    initial: there is a state before the first token, or a gradient of the last.
    """

    initial: bool = op.flag()

    def drawn(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """q, k, v, log-decays, a state, and a source of more."""
        source = op.generator(device, seed)
        q, k, v = self.normal(source, device, self.head_dim, self.head_dim, self.value_dim)
        g = self.decays(source, device, self.head_dim)
        return q, k, v, g, self.start(source, device) if self.initial else None, source

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B1,H1,S70,D32", "bf16"),
            ("B1,H1,S40,D64,V32,initial", "fp16"),
            ("B2,H1,S20,D16,initial", "fp32"),
            ("B1,H2,S1,D32,V16", "bf16"),
            ("B1,H1,S34,D24,V40,initial", "bf16"),
            ("B1,H1,S18,D128,V16", "fp16"),
            ("B1,H1,S17,D256,V16", "bf16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        lengths = 2048, 4096, 8192, 16384, 32768
        return {"gated": [cls.parse(f"B8,H16,S{n},D{d}", "bf16") for d in (64, 128) for n in lengths]}


@dataclass(frozen=True)
class Problem(ChannelDecay):
    """q, k, v, log_decay, initial_state, scale → o, state."""

    PRODUCTS = 4

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor,
        initial_state: torch.Tensor | None, scale: float,
    ) -> Self:  # fmt: skip
        return cls.posed(q, v, initial_state is not None)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, _ = self.drawn(device, seed)
        return *tensors, self.head_dim**-0.5

    def cost(self) -> Cost:
        """A token's place in the state, and what it reads there."""
        decays = 4 * self.tokens * self.head_dim
        return Cost(self.flops(), float(self.moved(2, 2) + decays + 4 * self.states * (1 + self.initial)))


@dataclass(frozen=True)
class BackwardProblem(ChannelDecay):
    """do, dstate, q, k, v, log_decay, initial_state, scale, decayed → dq, dk, dv, dlog_decay, dinitial_state."""

    PRODUCTS = 10

    @classmethod
    def of(
        cls, do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        log_decay: torch.Tensor, initial_state: torch.Tensor | None, scale: float, decayed: bool,
    ) -> Self:  # fmt: skip
        return cls.posed(q, v, dstate is not None or initial_state is not None)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, source = self.drawn(device, seed)
        do = op.normal(tensors[2].shape, source, device, self.torch_dtype)
        dstate = self.start(source, device) if self.initial else None
        return do, dstate, *tensors, self.head_dim**-0.5, True

    def cost(self) -> Cost:
        """Gradients of all that is read, which the states are needed for as well."""
        decays = 8 * self.tokens * self.head_dim
        return Cost(self.flops(), float(self.moved(4, 3) + decays + 3 * 4 * self.states * self.initial))
