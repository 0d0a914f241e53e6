"""The problems that linear attention without an order of tokens poses, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from tilebook import bounds, op
from tilebook.kernels.bidirectional.features import directions
from tilebook.kernels.bidirectional.form import MAPS, PERFORMER, SEED
from tilebook.kernels.bidirectional.layout import empty
from tilebook.kernels.bidirectional.pytorch import forward
from tilebook.op import Cost
from tilebook.problem import next_power_of_2

EPS = 1e-6


@dataclass(frozen=True)
class Bidirectional(op.Problem):
    """q (B, H, S, D), k (B, H, K, D), v (B, H, K, V), F features of each row of q and k.

    padded: some keys of each batch are hidden.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"head_dim", "value_dim", "features"})
    PRODUCTS: ClassVar[int]
    """Floating-point operations a token and number of the state, at least."""

    batch: int = op.size("B")
    heads: int = op.size("H")
    seq: int = op.size("S")
    keys: int = op.size("K", like="seq")
    head_dim: int = op.size("D")
    value_dim: int = op.size("V", like="head_dim")
    features: int = op.size("F", like="head_dim")
    dtype: str = "bf16"
    feature_map: str = op.choice(*MAPS)
    padded: bool = op.flag()

    @classmethod
    def posed(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, omega: torch.Tensor | None, feature_map: str
    ) -> Self:
        (batch, heads, seq, width), features = q.shape, q.shape[-1] if omega is None else omega.shape[1]
        return cls(
            batch, heads, seq, k.shape[2], width, v.shape[-1], features, op.dtype_name(q.dtype), feature_map,
            mask is not None,
        )  # fmt: skip

    def check(self) -> None:
        bounds.bidirectional(self)

    @property
    def wide(self) -> int:
        """Columns of a row in registers."""
        return max(16, next_power_of_2(self.head_dim))

    @property
    def wide_features(self) -> int:
        return max(16, next_power_of_2(self.features))

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def moved(self) -> int:
        """Numbers of q, k, v and o."""
        queries, keys = self.batch * self.heads * self.seq, self.batch * self.heads * self.keys
        return (queries + keys) * (self.head_dim + self.value_dim)

    def drawn(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """q, k, v, a mask, Performer's directions, a source of more."""
        source = op.generator(device, seed)
        shapes = ((self.seq, self.head_dim), (self.keys, self.head_dim), (self.keys, self.value_dim))
        q, k, v = (op.normal((self.batch, self.heads, *shape), source, device, self.torch_dtype) for shape in shapes)
        mask = omega = None
        if self.padded:
            mask = torch.empty((self.batch, self.keys), dtype=torch.bool, device=device)
            if not mask.is_meta:
                mask.copy_(op.normal(mask.shape, source, device, torch.float32) > 0.7)[:, 0] = False
        if self.feature_map == PERFORMER:
            omega = directions(self.head_dim, self.features, SEED, self.scale, q.dtype, q.device)
        if self.feature_map == "none" and not q.is_meta:  # weights are positive
            q, k = q.abs(), k.abs()
        return q, k, v, mask, omega, source

    def neighbours(self) -> Sequence[Self]:
        few = dataclasses.replace(self, batch=2, heads=3)
        return [dataclasses.replace(few, seq=n, keys=m) for n, m in ((1, 1), (453, 300), (2500, 2500))]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B2,H2,S70,D64", "bf16"),
            ("B1,H2,S40,D32,performer", "fp32"),
            ("B2,H1,S33,K50,D16,performer,padded", "bf16"),
            ("B1,H2,S1,D64,V32,relu", "fp16"),
            ("B1,H2,S100,D40,V72,F24,performer", "fp16"),
            ("B2,H2,S37,D24,V8,softmax,padded", "fp32"),
            ("B1,H1,S65,K17,D128,V96,none,padded", "bf16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        shapes = "B16,H12,S256,D64", "B16,H12,S512,D64", "B16,H12,S1024,D64", "B16,H12,S2048,D64"
        maps = ",performer", ",performer,padded", ""
        return {"linear": [cls.parse(shape + how, "bf16") for shape in shapes for how in maps]}


@dataclass(frozen=True)
class Problem(Bidirectional):
    """q, k, v, mask, omega, feature_map, scale, eps → o, state, den."""

    PRODUCTS = 4

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, omega: torch.Tensor | None,
        feature_map: str, scale: float, eps: float,
    ) -> Self:  # fmt: skip
        return cls.posed(q, k, v, mask, omega, feature_map)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        *tensors, _ = self.drawn(device, seed)
        return *tensors, self.feature_map, self.scale, EPS

    def cost(self) -> Cost:
        flops = self.PRODUCTS * self.batch * self.heads * (self.seq + self.keys) / 2 * self.features * self.value_dim
        if self.feature_map == PERFORMER:
            flops += 2 * self.batch * self.heads * (self.seq + self.keys) * self.features * self.head_dim
        return Cost(float(flops), float(self.moved * self.torch_dtype.itemsize))


@dataclass(frozen=True)
class BackwardProblem(Bidirectional):
    """do, q, k, v, mask, omega, o, state, den, feature_map, scale, eps → dq, dk, dv."""

    PRODUCTS = 10

    @classmethod
    def of(
        cls, do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
        omega: torch.Tensor | None, o: torch.Tensor, state: torch.Tensor, den: torch.Tensor, feature_map: str,
        scale: float, eps: float,
    ) -> Self:  # fmt: skip
        return cls.posed(q, k, v, mask, omega, feature_map)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        q, k, v, mask, omega, source = self.drawn(device, seed)
        options = self.feature_map, self.scale, EPS
        kept = empty(q, v, self.features) if q.is_meta else forward(q, k, v, mask, omega, *options)
        do = op.normal(kept[0].shape, source, device, self.torch_dtype)
        return do, q, k, v, mask, omega, *kept, *options

    def cost(self) -> Cost:
        """What is read forward, o and its gradient besides, and three gradients."""
        flops = self.PRODUCTS * self.batch * self.heads * (self.seq + self.keys) / 2 * self.features * self.value_dim
        if self.feature_map == PERFORMER:
            flops += 4 * self.batch * self.heads * (self.seq + self.keys) * self.features * self.head_dim
        more = self.batch * self.heads * self.seq * self.value_dim
        return Cost(float(flops), float((2 * self.moved + more) * self.torch_dtype.itemsize))
