"""The problems that norms over the last axis pose, and the suites to tune."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from tilebook import models, op
from tilebook.layout import beside
from tilebook.op import Cost
from tilebook.problem import next_power_of_2

_TRAINED = 2048
"""Rows that a training step has at least."""

_TRANSPOSED = "transposed"


@dataclass(frozen=True)
class Norm(op.Problem):
    """`rows` vectors of `width`; calls round their rows up to a power of two, so that one verdict serves a bucket.

    parameters: "affine" with all that the norm has (a weight, a bias), "unbiased" without the bias, "bare" with none.
    lies: "transposedS" of x (B, S, N) whose rows of a batch are side by side in memory; all else has contiguous rows.
    """

    EXACT = frozenset({"width"})
    TRANSFER = 0.85
    FAMILY: ClassVar[str]
    """Whose norms of public models these are."""
    STATISTICS: ClassVar[int]
    """Numbers of each row that a forward pass keeps, in fp32."""
    VECTORS: ClassVar[int]
    """Parameter vectors of an affine one."""
    TURNED: ClassVar[bool] = True
    """May x lie transposed?"""

    dtype: str
    rows: int = op.size("M")
    width: int = op.size("N")
    parameters: str = op.choice("affine", "unbiased", "bare", elided=True)
    lies: str = op.pattern(rf"{_TRANSPOSED}([2-9]|[1-9]\d{{1,8}})", f"{_TRANSPOSED}<S>")

    def check(self) -> None:
        if self.lies and not self.TURNED:
            raise op.UsageError(f"{self.label}: what is added up has contiguous rows")

    @property
    def vectors(self) -> int:
        """How many parameter vectors there are, and hence gradients of such."""
        return {"affine": self.VECTORS, "unbiased": 1, "bare": 0}[self.parameters]

    @property
    def beside(self) -> int:
        """Rows of a batch, where they are side by side in memory, else 0."""
        return int(self.lies.removeprefix(_TRANSPOSED) or 0)

    @classmethod
    def posed(cls, x: torch.Tensor, *vectors: torch.Tensor | None) -> Self:
        """The problem of x (M, N), or (B, S, N), with these parameter vectors, None where one is left out."""
        there = sum(vector is not None for vector in vectors)
        parameters = "bare" if not there else "affine" if there == cls.VECTORS else "unbiased"
        length = beside(x)
        lies = f"{_TRANSPOSED}{length}" if length else ""
        return cls(op.dtype_name(x.dtype), next_power_of_2(math.prod(x.shape[:-1])), x.shape[-1], parameters, lies)

    def like(self, measured: op.Problem) -> bool:
        """Rows of about the same width, which are as many blocks, and at least as many of them: few gain less."""
        if not isinstance(measured, Norm) or type(measured) is not type(self):
            return False
        if self.lies or measured.lies:
            return False
        alike = (self.dtype, self.parameters) == (measured.dtype, measured.parameters) and not self.width % 16
        wide = next_power_of_2(self.width) == next_power_of_2(measured.width) and 10 * self.width >= 7 * measured.width
        return alike and wide and 7 * self.width <= 10 * measured.width and 1 <= self.rows / measured.rows <= 4

    def neighbours(self) -> Sequence[Self]:
        more = min(max(1024, 2 * self.rows), (1 << 26) // self.width)  # cheap, and yet more than any GPU runs at once
        if length := self.beside:  # of others the units are the same, and so is the kernel
            near = ((length, 1), (length + 128, 3), (3 * length, 1), (length, more // length))
            posed = [dataclasses.replace(self, rows=n * each, lies=f"{_TRANSPOSED}{each}") for each, n in near if n]
            return [each for each in posed if each != self]
        rows = [333, 1, *([more] if more > self.rows else [])]
        return [dataclasses.replace(self, rows=each) for each in rows if each != self.rows]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("M64,N128", "bf16"),
            ("M17,N100", "fp16"),
            ("M1,N1024", "bf16"),
            ("M5,N1500", "fp32"),
            ("M2,N1", "fp32"),
            ("M100,N24", "bf16"),
            ("M3,N4097", "fp16"),
            ("M33,N64", "fp32"),
            ("M9,N136,bare", "bf16"),
            ("M6,N1500,bare", "fp32"),
            ("M24,N100,transposed12", "fp32"),
            ("M33,N136,transposed11", "bf16"),
            ("M20,N1500,bare,transposed10", "fp16"),
            ("M4,N24,transposed4", "fp32"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts if cls.TURNED or _TRANSPOSED not in text]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        norms = [cls.parse(f"M8192,N{width}", "bf16") for width in (1024, 4096, 16384)]
        posed = [cls.parse(*each) for each in models.shapes(cls.FAMILY)]
        many = [problem for problem in posed if problem.rows >= _TRAINED]
        fp32 = [dataclasses.replace(problem, dtype="fp32") for problem in many]  # as autocast has norms
        return {"norms": norms, "models": posed, "training": list(dict.fromkeys(fp32))}

    def drawn(self, device: torch.device | str, seed: int, matrices: int) -> tuple[list[torch.Tensor], list[Any]]:
        """So many random (M, N), of which the last is x, as it lies, and (N,) for each vector there may be, None for
        those that are not there.
        """
        source = op.generator(device, seed)
        batches = max(1, self.rows // (self.beside or 1))
        rows = batches * self.beside or self.rows
        shapes = [(rows, self.width)] * matrices + [(self.width,)] * self.vectors
        drawn = [op.normal(shape, source, device, torch.float32).to(self.torch_dtype) for shape in shapes]
        if self.beside:
            drawn[matrices - 1] = drawn[matrices - 1].view(batches, self.width, self.beside).mT
        return drawn[:matrices], [*drawn[matrices:], *[None] * (self.VECTORS - self.vectors)]

    def moved(self, matrices: int, vectors: int) -> float:
        """Bytes of so many (M, N) and (N,), and of a row's statistics."""
        itemsize = self.torch_dtype.itemsize
        return float(itemsize * self.width * (matrices * self.rows + vectors) + 4 * self.STATISTICS * self.rows)


@dataclass(frozen=True)
class RMSProblem(Norm):
    """What RMSNorm's forward and backward have in common."""

    FAMILY = "rms_norm"
    STATISTICS = 1
    VECTORS = 1

    def __post_init__(self) -> None:
        if self.parameters == "unbiased":  # as it always is
            object.__setattr__(self, "parameters", "affine")


@dataclass(frozen=True)
class Problem(RMSProblem):
    """x, weight, eps → y, rstd."""

    @classmethod
    def of(cls, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> Self:
        return cls.posed(x, weight)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        (x,), vectors = self.drawn(device, seed, 1)
        return x, *vectors, 1e-6

    def cost(self) -> Cost:
        return Cost(4.0 * self.rows * self.width, self.moved(2, self.vectors))


@dataclass(frozen=True)
class BackwardProblem(RMSProblem):
    """dy, x, weight, rstd → dx, dweight."""

    @classmethod
    def of(cls, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor) -> Self:
        return cls.posed(x, weight)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        (dy, x), vectors = self.drawn(device, seed, 2)
        return dy, x, *vectors, torch.empty(len(dy), device=device) if x.is_meta else rstd(x.float(), 1e-6).view(-1)

    def cost(self) -> Cost:
        # The weight is read, its gradient written.
        return Cost(10.0 * self.rows * self.width, self.moved(3, 2 * self.vectors))


def rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / √(mean(x²) + eps) of each row."""
    return torch.rsqrt(x.square().mean(-1) + eps)
