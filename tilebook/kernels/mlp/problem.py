"""The problems of the MLP ops: one matrix product each, (M, K) times (K, N), with what its epilogue moves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import models, op
from tilebook.kernels.mlp.form import ACTIVATIONS
from tilebook.op import Cost

_MOST_ELEMENTS = 1 << 26  # of a neighbour's tensor: verification must stay cheap


@dataclass(frozen=True)
class Problem(op.Problem):
    """`rows` tokens of `width` features, `inner` features between the two layers."""

    EXACT = frozenset({"width", "inner"})

    dtype: str
    rows: int = op.size("M")
    width: int = op.size("H")
    inner: int = op.size("I")
    activation: str = op.choice(*ACTIVATIONS)

    @property
    def gemm(self) -> tuple[int, int, int]:
        """(M, N, K) of the product that the op's kernel computes."""
        return self.rows, self.inner, self.width

    def cost(self) -> Cost:
        m, n, k = self.gemm
        itemsize = self.torch_dtype.itemsize
        return Cost(2.0 * m * n * k, float(itemsize * (m * k + n * k + n + self.tiles_moved * m * n)))

    @property
    def tiles_moved(self) -> int:
        """How many (M, N) tensors the epilogue reads or writes."""
        return 1

    def neighbours(self) -> Sequence[Self]:
        # The same widths, hence the same binary: another one would have to be compiled for the check alone.
        more = min(max(1024, 2 * self.rows), _MOST_ELEMENTS // max(self.width, self.inner))
        rows = [333, 1, *([more] if more > self.rows else [])]
        return [dataclasses.replace(self, rows=each) for each in rows if each != self.rows]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("M64,H64,I128", "bf16"),
            ("M1,H24,I40", "fp16"),
            ("M17,H40,I24,relu", "bf16"),
            ("M100,H64,I96,gelu_tanh", "fp16"),
            ("M100,H24,I136,gelu_tanh", "bf16"),
            ("M65,H136,I72", "fp16"),
            ("M33,H19,I45", "bf16"),
            ("M130,H128,I64,relu", "fp16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        cct, distilbert = (cls.parse(text, "bf16") for text in ("M1568,H384,I1152", "M4096,H768,I3072"))
        found = dict.fromkeys(cls.parse(*each) for each in models.shapes("mlp"))
        trained = cls in (BackwardProblem, GradsProblem)
        kept = [each for each in found if each.rows >= models.LEAST_TRAINED_ROWS or not trained]
        return {"quick": [cct], "seeds": [cct, distilbert], "models": kept}

    def _random(self, device: torch.device | str, seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
        """Normal tensors; a matrix of weights (after the first shape) keeps the scale of what it multiplies."""
        source = op.generator(device, seed)
        scales = [1.0] + [shape[-1] ** -0.5 if len(shape) == 2 else 0.5 for shape in shapes[1:]]
        return [
            op.normal(shape, source, device, torch.float32, scale).to(self.torch_dtype)
            for shape, scale in zip(shapes, scales, strict=True)
        ]


@dataclass(frozen=True)
class UpProblem(Problem):
    """x (M, H) → h (M, I)."""

    @classmethod
    def of(cls, x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str, save: bool) -> UpProblem:
        return cls(op.dtype_name(x.dtype), x.shape[0], w1.shape[1], w1.shape[0], activation)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        m, n, k = self.gemm
        return (*self._random(device, seed, (m, k), (n, k), (n,)), self.activation, True)

    @property
    def tiles_moved(self) -> int:
        return 2


@dataclass(frozen=True)
class DownProblem(Problem):
    """h (M, I) → y (M, H)."""

    def __post_init__(self) -> None:
        # No activation takes part in this product: whatever the block's is, one verdict serves.
        object.__setattr__(self, "activation", ACTIVATIONS[0])

    @classmethod
    def of(cls, h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> DownProblem:
        return cls(op.dtype_name(h.dtype), h.shape[0], w2.shape[0], w2.shape[1])

    @property
    def gemm(self) -> tuple[int, int, int]:
        return self.rows, self.width, self.inner

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        m, n, k = self.gemm
        return tuple(self._random(device, seed, (m, k), (n, k), (n,)))


@dataclass(frozen=True)
class BackwardProblem(Problem):
    """dy (M, H) → dz (M, I)."""

    @classmethod
    def of(cls, dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str) -> BackwardProblem:
        return cls(op.dtype_name(dy.dtype), dy.shape[0], w2.shape[0], w2.shape[1], activation)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        m, n, k = self.gemm
        dy, w2, z = self._random(device, seed, (m, k), (k, n), (m, n))
        return dy, w2, z if z.is_meta else z * n**0.5, self.activation

    @property
    def tiles_moved(self) -> int:
        return 3


@dataclass(frozen=True)
class GradsProblem(Problem):
    """dy, x (M, H), h, dz (M, I) and w1 (I, H) → dx (M, H), dw1 (I, H), db1 (I,), dw2 (H, I), db2 (H,)."""

    def __post_init__(self) -> None:
        # dz has seen the activation already: whatever it was, one verdict serves.
        object.__setattr__(self, "activation", ACTIVATIONS[0])

    @classmethod
    def of(cls, dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor) -> GradsProblem:
        return cls(op.dtype_name(dy.dtype), dy.shape[0], dy.shape[1], h.shape[1])

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        wide, inner = (self.rows, self.width), (self.rows, self.inner)
        dy, h, dz, x, w1 = self._random(device, seed, wide, inner, inner, wide, (self.inner, self.width))
        return dy, h, dz, x if x.is_meta else x * self.width**0.5, w1

    def cost(self) -> Cost:
        m, width, inner = self.rows, self.width, self.inner
        moved = 3 * m * width + 2 * m * inner + 3 * width * inner + width + inner
        return Cost(6.0 * m * width * inner, float(self.torch_dtype.itemsize * moved))
