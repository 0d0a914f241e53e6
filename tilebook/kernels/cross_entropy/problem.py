"""The problems that cross entropy over the last axis poses, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from tilebook import op
from tilebook.op import Cost
from tilebook.problem import next_power_of_2

IGNORED = -100
"""The target of rows that do not count, as PyTorch has it unless told otherwise."""

VOCABULARIES = (30522, 32000, 50257, 128256, 151936, 256000)
"""Of BERT, of Llama-2 and Mistral, of GPT-2, of Llama-3, of Qwen2, of Gemma."""

ROWS = (4096, 8192, 16384)

MOST_ELEMENTS = 5 << 28
"""Of the logits in a suite: verification has them, the truth and their difference in fp32 side by side."""

PIECE = 1 << 26
"""Numbers of the logits that references take at a time, so that what they make of them fits into memory."""

_VOCABULARY, _MANY, _APART = 16384, 1024, 4.0
"""Classes and rows from which on problems are like each other, if no more doublings than that are between them."""

_IGNORED_EVERY = 61
"""Of the rows that inputs have. More would flatter kernels that do not read them."""


@dataclass(frozen=True)
class CrossEntropy(op.Problem):
    """`rows` distributions over `classes`; calls round their rows up to a power of two.

    smoothed: with label smoothing. capped: with a soft-cap of the logits; inputs have a z-loss then, too, which is
    arithmetic on one number a row.
    """

    EXACT = frozenset({"classes"})
    TRANSFER = 0.6
    PASSES: ClassVar[int]
    """How often as many bytes as the logits have are moved."""
    FLOPS: ClassVar[float]
    """For each logit."""

    dtype: str
    rows: int = op.size("M")
    classes: int = op.size("V")
    smoothed: bool = op.flag(elided=True)
    capped: bool = op.flag(elided=True)

    @classmethod
    def posed(cls, logits: torch.Tensor, label_smoothing: float, softcap: float) -> Self:
        rows, classes = logits.shape
        return cls(op.dtype_name(logits.dtype), next_power_of_2(rows), classes, label_smoothing != 0, softcap != 0)

    def like(self, measured: op.Problem) -> bool:
        """Vocabularies: rows of many blocks, and so many that no GPU waits for work."""
        if not isinstance(measured, CrossEntropy) or type(measured) is not type(self):
            return False
        forms = [(each.dtype, each.smoothed, each.capped) for each in (self, measured)]
        many = min(self.classes, measured.classes) >= _VOCABULARY and min(self.rows, measured.rows) >= _MANY
        return forms[0] == forms[1] and many and self.apart(measured) <= _APART

    def neighbours(self) -> Sequence[Self]:
        more = min(max(1024, 2 * self.rows), (1 << 26) // self.classes)  # cheap, and yet more than any GPU runs at once
        rows = [min(333, max(2, (1 << 26) // self.classes)), 1, *([more] if more > self.rows else [])]
        return [dataclasses.replace(self, rows=each) for each in rows if each != self.rows]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("M64,V128", "bf16"),
            ("M17,V100", "fp16"),
            ("M5,V1500", "fp32"),
            ("M3,V4097,smoothed", "bf16"),
            ("M2,V1", "fp32"),
            ("M100,V7", "bf16"),
            ("M9,V1000,capped", "bf16"),
            ("M3,V5003", "fp16"),
            ("M4,V9001,smoothed,capped", "fp32"),
            ("M33,V64,smoothed", "fp32"),
            ("M1,V20000", "bf16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        shapes = [(m, v) for v in VOCABULARIES for m in ROWS if m * v <= MOST_ELEMENTS]
        posed = [cls(dtype, m, v) for dtype in ("bf16", "fp32") for m, v in shapes]
        return {"models": posed, "training": posed}

    def drawn(self, device: torch.device | str, seed: int) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
        """Random logits (M, V), targets (M,), of which every 61st is ignored, and the options."""
        source = op.generator(device, seed)
        logits = op.normal((self.rows, self.classes), source, device, torch.float32).to(self.torch_dtype)
        options = 0.1 if self.smoothed else 0.0, IGNORED, 20.0 if self.capped else 0.0, 1e-3 if self.capped else 0.0
        if logits.is_meta:
            return logits, torch.empty(self.rows, dtype=torch.int64, device=device), options
        target = torch.randint(self.classes, (self.rows,), generator=source, device=device)
        target[1::_IGNORED_EVERY] = IGNORED
        return logits, target, options

    def cost(self) -> Cost:
        logits = self.rows * self.classes
        return Cost(self.FLOPS * logits, float(self.PASSES * self.torch_dtype.itemsize * logits + 16 * self.rows))


@dataclass(frozen=True)
class Problem(CrossEntropy):
    """logits, target, label_smoothing, ignore_index, softcap, z_loss → loss, lse."""

    PASSES = 1
    FLOPS = 4.0

    @classmethod
    def of(
        cls, logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, ignore_index: int, softcap: float,
        z_loss: float,
    ) -> Self:  # fmt: skip
        return cls.posed(logits, label_smoothing, softcap)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        logits, target, options = self.drawn(device, seed)
        return logits, target, *options


@dataclass(frozen=True)
class BackwardProblem(CrossEntropy):
    """dloss, logits, target, lse, then the same options → dlogits."""

    PASSES = 2
    FLOPS = 5.0

    @classmethod
    def of(
        cls, dloss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, label_smoothing: float,
        ignore_index: int, softcap: float, z_loss: float,
    ) -> Self:  # fmt: skip
        return cls.posed(logits, label_smoothing, softcap)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        logits, target, options = self.drawn(device, seed)
        if logits.is_meta:
            dloss, lse = (torch.empty(self.rows, device=device) for _ in range(2))
        else:
            dloss = op.normal((self.rows,), op.generator(device, seed + 1), device, torch.float32)
            lse = by_rows(lambda x: torch.logsumexp(capped(x.float(), options[2]), 1), logits)
            lse = torch.where(target == IGNORED, 0.0, lse)
        return dloss, logits, target, lse, *options


def capped(x: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap · tanh(x / softcap), x itself where softcap is 0."""
    return softcap * torch.tanh(x / softcap) if softcap else x


def by_rows(function: Any, *tensors: torch.Tensor) -> torch.Tensor:
    """A function of rows, for a `PIECE` of its last argument at a time."""
    rows, classes = tensors[-1].shape
    step = max(1, PIECE // max(1, classes))
    if rows <= step:
        return function(*tensors)  # type: ignore[no-any-return]
    first: torch.Tensor = function(*(each[:step] for each in tensors))
    out = first.new_empty(rows, *first.shape[1:])
    out[:step] = first
    for start in range(step, rows, step):
        out[start : start + step] = function(*(each[start : start + step] for each in tensors))
    return out
