"""The problems that the gated delta rule poses, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from tilebook import bounds, op
from tilebook.op import Cost
from tilebook.problem import next_power_of_2


@dataclass(frozen=True)
class DeltaRule(op.Problem):
    """q and k (B, H, S, D), v (B, H, S, V), β (B, H, S).

    decay: log-decays (B, H, S). initial: there is a state before the first token, or a gradient of the last.
    normalized: rows of q and k are divided by their lengths.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"head_dim", "value_dim"})
    PRODUCTS: ClassVar[int]
    """Floating-point operations a token and number of the state, at least."""

    batch: int = op.size("B")
    heads: int = op.size("H")
    seq: int = op.size("S")
    head_dim: int = op.size("D")
    value_dim: int = op.size("V", like="head_dim")
    dtype: str = "bf16"
    decay: bool = op.flag()
    initial: bool = op.flag()
    normalized: bool = op.flag()

    @classmethod
    def posed(cls, q: torch.Tensor, v: torch.Tensor, decay: bool, initial: bool, normalized: bool) -> Self:
        batch, heads, seq, width = q.shape
        return cls(batch, heads, seq, width, v.shape[-1], op.dtype_name(q.dtype), decay, initial, normalized)

    def check(self) -> None:
        bounds.linear_attention(self)

    @property
    def wide(self) -> int:
        """Rows of a state in registers."""
        return max(16, next_power_of_2(self.head_dim))

    @property
    def tokens(self) -> int:
        return self.batch * self.heads * self.seq

    @property
    def states(self) -> int:
        """Numbers of all heads' states."""
        return self.batch * self.heads * self.head_dim * self.value_dim

    def drawn(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """q, k, v, log-decays of 1 down to 1e-6, β, a state, and a source of more. Keys are of length 1, or made so."""
        source = op.generator(device, seed)
        qk = (self.batch, self.heads, self.seq, self.head_dim)
        q, v = (op.normal(shape, source, device, self.torch_dtype) for shape in (qk, (*qk[:3], self.value_dim)))
        k = op.normal(qk, source, device, torch.float32)
        if not (k.is_meta or self.normalized):
            k = torch.nn.functional.normalize(k, dim=-1)
        g = state = None
        if self.decay:
            g = op.normal(qk[:3], source, device, torch.float32)
            g = g if g.is_meta else -(g * g * g * g).clamp(max=138) / 10
        beta = op.normal(qk[:3], source, device, torch.float32)
        if self.initial:
            state = op.normal((*qk[:2], self.head_dim, self.value_dim), source, device, torch.float32)
        k = torch.empty(qk, dtype=self.torch_dtype, device=device) if k.is_meta else k.to(self.torch_dtype)
        return q, k, v, g, beta if beta.is_meta else beta.sigmoid(), state, source

    def neighbours(self) -> Sequence[Self]:
        few = dataclasses.replace(self, batch=2, heads=3)
        return [dataclasses.replace(few, seq=n, initial=more) for n, more in ((1, False), (453, True), (2500, False))]

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
        moved = 2 * self.tokens * (self.head_dim + self.value_dim) * self.torch_dtype.itemsize
        flops = self.PRODUCTS * self.tokens * self.head_dim * self.value_dim
        statistics = 4 * self.tokens * (1 + self.decay)
        return Cost(float(flops), float(moved + statistics + 4 * self.states * (1 + self.initial)))


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
        dstate = op.normal(tensors[5].shape, source, device, torch.float32) if self.initial else None
        return do, dstate, *tensors, self.head_dim**-0.5, self.normalized

    def cost(self) -> Cost:
        """Gradients of all that is read, which the states are needed for as well."""
        moved = self.tokens * (4 * self.head_dim + 3 * self.value_dim) * self.torch_dtype.itemsize
        statistics = 8 * self.tokens * (1 + self.decay)
        flops = self.PRODUCTS * self.tokens * self.head_dim * self.value_dim
        return Cost(float(flops), float(moved + statistics + 3 * 4 * self.states * self.initial))
