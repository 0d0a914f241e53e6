"""The problems that the gated delta rule poses, and the suites to tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import op
from tilebook.kernels.linear_attention.recurrent import Recurrent
from tilebook.op import Cost


@dataclass(frozen=True)
class DeltaRule(Recurrent):
    """q and k (B, H, S, D), v (B, H, S, V), β (B, H, S).

    decay: log-decays (B, H, S). initial: there is a state before the first token, or a gradient of the last.
    normalized: rows of q and k are divided by their lengths.
    """

    decay: bool = op.flag()
    initial: bool = op.flag()
    normalized: bool = op.flag()

    def drawn(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """q, k, v, log-decays, β, a state, and a source of more. Keys are of length 1, or made so."""
        source = op.generator(device, seed)
        q, v = self.normal(source, device, self.head_dim, self.value_dim)
        k = op.normal(q.shape, source, device, torch.float32)
        if not (k.is_meta or self.normalized):
            k = torch.nn.functional.normalize(k, dim=-1)
        g = self.decays(source, device) if self.decay else None
        beta = op.normal(q.shape[:3], source, device, torch.float32)
        state = self.start(source, device) if self.initial else None
        k = torch.empty_like(q) if k.is_meta else k.to(self.torch_dtype)
        return q, k, v, g, beta if beta.is_meta else beta.sigmoid(), state, source

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B1,H1,S70,D64,decay,normalized", "bf16"),
            ("B1,H2,S40,D32,decay", "fp16"),
            ("B2,H1,S20,D16,decay,initial,normalized", "fp32"),
            ("B1,H2,S1,D64,V32,decay", "bf16"),
            ("B1,H1,S70,D24,V40,initial,normalized", "fp16"),
            ("B1,H1,S33,D128,decay,initial", "bf16"),
            ("B1,H2,S40,D256,V16,decay,normalized", "bf16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        shapes = "B8,H16,S2048,D64", "B8,H16,S2048,D128", "B1,H32,S8192,D128", "B4,H32,S8192,D128"
        return {"delta": [cls.parse(f"{shape},decay,normalized", "bf16") for shape in shapes]}


@dataclass(frozen=True)
class Problem(DeltaRule):
    """q, k, v, log_decay, beta, initial_state, scale, normalize → o, state."""

    PRODUCTS = 6

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None, beta: torch.Tensor,
        initial_state: torch.Tensor | None, scale: float, normalize: bool,
    ) -> Self:  # fmt: skip
        return cls.posed(q, v, log_decay is not None, initial_state is not None, normalize)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, _ = self.drawn(device, seed)
        return *tensors, self.head_dim**-0.5, self.normalized

    def cost(self) -> Cost:
        """What a token finds in the state, adds to it and reads there."""
        statistics = 4 * self.tokens * (1 + self.decay)
        return Cost(self.flops(), float(self.moved(2, 2) + statistics + 4 * self.states * (1 + self.initial)))


@dataclass(frozen=True)
class BackwardProblem(DeltaRule):
    """do, dstate, q, k, v, log_decay, beta, initial_state, scale, normalize → dq, dk, dv, dlog_decay,
    dbeta, dinitial_state.
    """

    PRODUCTS = 16

    @classmethod
    def of(
        cls, do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        log_decay: torch.Tensor | None, beta: torch.Tensor, initial_state: torch.Tensor | None, scale: float,
        normalize: bool,
    ) -> Self:  # fmt: skip
        initial = dstate is not None or initial_state is not None
        return cls.posed(q, v, log_decay is not None, initial, normalize)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, source = self.drawn(device, seed)
        do = op.normal(tensors[2].shape, source, device, self.torch_dtype)
        dstate = self.start(source, device) if self.initial else None
        return do, dstate, *tensors, self.head_dim**-0.5, self.normalized

    def cost(self) -> Cost:
        """Gradients of all that is read, which the states are needed for as well."""
        statistics = 8 * self.tokens * (1 + self.decay)
        return Cost(self.flops(), float(self.moved(4, 3) + statistics + 3 * 4 * self.states * self.initial))
