"""The problems that causal linear attention poses, and the suites to tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import op
from tilebook.kernels.bidirectional.form import MAPPED
from tilebook.kernels.linear_attention.recurrent import Recurrent
from tilebook.op import Cost

EPS = 1e-6


@dataclass(frozen=True)
class LinearAttention(Recurrent):
    """q and k (B, H, S, D), v (B, H, S, V).

    decay: log-decays (B, H, S). initial: there is a state before the first token, or a gradient of the last.
    normalized: outputs are divided by their weights. feature_map: what is made of q and k first.
    """

    decay: bool = op.flag()
    initial: bool = op.flag()
    normalized: bool = op.flag()
    feature_map: str = op.choice("none", *MAPPED, elided=True)

    @property
    def states(self) -> int:
        """Numbers of all heads' states."""
        return self.batch * self.heads * self.head_dim * (self.value_dim + self.normalized)

    def drawn(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """q, k, v, log-decays, a state, and a source of more. Normalized, features are positive."""
        source = op.generator(device, seed)
        q, k, v = self.normal(source, device, self.head_dim, self.head_dim, self.value_dim)
        if self.normalized and self.feature_map == "none" and not q.is_meta:
            q, k = q.abs(), k.abs()
        g = self.decays(source, device) if self.decay else None
        state = self.start(source, device, self.normalized) if self.initial else None
        if state is not None and self.normalized and not state.is_meta:
            state[..., -1].abs_()
        return q, k, v, g, state, source

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B2,H2,S128,D64,decay", "bf16"),
            ("B1,H2,S100,D32", "fp16"),
            ("B2,H1,S77,D16,decay,initial", "fp32"),
            ("B1,H2,S130,D64,normalized", "bf16"),
            ("B1,H2,S1,D64,V32,decay", "bf16"),
            ("B1,H2,S200,D40,V72,decay", "fp16"),
            ("B1,H2,S97,D64,decay,initial,normalized", "fp32"),
            ("B2,H2,S70,D128,V96,decay,initial", "bf16"),
            ("B1,H1,S65,D256,V256", "bf16"),
            ("B2,H3,S40,D64,V32,decay,initial", "bf16"),
            ("B2,H1,S33,D24,V8,initial,normalized", "fp16"),
            ("B1,H2,S77,D40,V24,normalized,elu+1", "bf16"),
            ("B1,H1,S50,D16,decay,initial,relu", "fp32"),
            ("B1,H1,S35,D24,initial,normalized,softmax", "fp16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        lengths = 2048, 4096, 8192, 16384, 32768
        found = [
            cls.parse(f"B8,H16,S{n},D{d}{decay}", "bf16")
            for decay in (",decay", "")
            for d in (64, 128)
            for n in lengths
        ]
        more = "B16,H12,S256,D64,normalized", *(f"B8,H16,S8192,D{d},normalized,elu+1" for d in (64, 128))
        return {"linear": [*found, *(cls.parse(text, "bf16") for text in more)]}


@dataclass(frozen=True)
class Problem(LinearAttention):
    """q, k, v, log_decay, initial_state, scale, normalize, eps → o, state, den."""

    PRODUCTS = 4

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None,
        initial_state: torch.Tensor | None, scale: float, normalize: bool, eps: float, feature_map: str = "none",
    ) -> Self:  # fmt: skip
        return cls.posed(q, v, log_decay is not None, initial_state is not None, normalize, feature_map)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, _ = self.drawn(device, seed)
        return *tensors, self.head_dim**-0.5, self.normalized, EPS, self.feature_map

    def cost(self) -> Cost:
        """A token's place in the state, and what it reads there."""
        statistics = 4 * self.tokens * (self.decay + self.normalized)
        return Cost(self.flops(), float(self.moved(2, 2) + statistics + 4 * self.states * (1 + self.initial)))


@dataclass(frozen=True)
class BackwardProblem(LinearAttention):
    """do, dstate, q, k, v, log_decay, initial_state, weight, scale, decayed → dq, dk, dv, dlog_decay, dinitial_state.

    What a call normalized has become `weight`: the gradient of each row's divisor, see `entry`.
    """

    PRODUCTS = 10

    @classmethod
    def of(
        cls, do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        log_decay: torch.Tensor | None, initial_state: torch.Tensor | None, weight: torch.Tensor | None, scale: float,
        decayed: bool, feature_map: str = "none",
    ) -> Self:  # fmt: skip
        initial = dstate is not None or initial_state is not None
        return cls.posed(q, v, log_decay is not None, initial, weight is not None, feature_map)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        q, k, v, g, state, source = self.drawn(device, seed)
        do = op.normal(v.shape, source, device, self.torch_dtype)
        dstate = self.start(source, device, self.normalized) if self.initial else None
        weight = op.normal(q.shape[:3], source, device, torch.float32) if self.normalized else None
        return do, dstate, q, k, v, g, state, weight, self.head_dim**-0.5, self.decay, self.feature_map

    def cost(self) -> Cost:
        """Gradients of all that is read, which the states are needed for as well."""
        statistics = 4 * self.tokens * (2 * self.decay + self.normalized)
        return Cost(self.flops(), float(self.moved(4, 3) + statistics + 3 * 4 * self.states * self.initial))
