"""The problems that packed sequences pose, forward and backward, and the suites to tune."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from tilebook import bounds
from tilebook.kernels.attention import eager as attention
from tilebook.kernels.attention import problem as padded
from tilebook.kernels.attention.form import Form, form
from tilebook.kernels.varlen import eager
from tilebook.kernels.varlen.limits import simplest
from tilebook.op import Cost, Problem, choice, demand, dtype_name, flag, generator, normal, pattern, size
from tilebook.problem import cdiv, next_power_of_2

SOFTCAP = 3.0
"""What the scores of a capped problem's random inputs are capped at; no verdict depends on it."""

_SPREAD = 6.0
"""Binary orders of magnitude between the weights by which tokens are shared out among sequences."""


def _shared_out(total: int, longest: int, count: int, source: random.Random) -> list[int]:
    """`count` lengths that sum to `total`, one of them `longest` and none longer; mostly short ones, as in text."""
    weights = [2.0 ** source.uniform(0.0, _SPREAD) for _ in range(count - 1)]
    lengths, rest, left = [longest], total - longest, sum(weights)
    for later, weight in zip(reversed(range(count - 1)), weights, strict=True):
        share = round(rest * weight / left) if later else rest
        share = min(max(share, rest - later * longest, 0), longest, rest)
        lengths.append(share)
        rest, left = rest - share, left - weight
    source.shuffle(lengths)
    return lengths


@dataclass(frozen=True)
class ForwardProblem(Problem):
    """q (T, H, D), k and v (Tk, Hkv, D): B sequences of up to S queries and Sk keys, one after the other.

    Sizes of packs differ from step to step, so all but the heads and the head dimension are rounded up to a power of
    two: one verdict serves the bucket. The lengths themselves stay on the GPU and are no part of the problem; `inputs`
    makes some that are as ragged as text.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"head_dim"})
    PART: ClassVar[type[padded.ForwardProblem]] = padded.ForwardProblem

    batch: int = size("B")
    heads: int = size("H")
    heads_kv: int = size("Hkv", like="heads")
    total_q: int = size("T")
    total_k: int = size("Tk", like="total_q")
    max_q: int = size("S")
    max_k: int = size("Sk", like="max_q")
    head_dim: int = size("D")
    dtype: str = "bf16"
    causal: bool = flag()
    diagonal: str = choice("bottom_right", "top_left", elided=True)
    window: str = pattern(padded.WINDOW, "window[left]x[right]")
    softcap: bool = flag(elided=True)
    tf32: bool = flag(elided=True)
    deterministic: bool = demand()

    def __post_init__(self) -> None:
        for name in ("batch", "total_q", "total_k", "max_q", "max_k"):
            object.__setattr__(self, name, int(next_power_of_2(max(1, getattr(self, name)))))
        left, right = self._sides
        left, right, corner = simplest(self.max_q, self.max_k, left, right, self.diagonal == "bottom_right")
        values = {
            "causal": right == 0,
            "diagonal": "bottom_right" if corner else "top_left",
            "window": padded.written_window(left, right),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def _sides(self) -> tuple[int, int]:
        """Columns to the left and to the right of the diagonal, -1 without limit."""
        left, right = padded.read_window(self.window)
        return left, 0 if self.causal else right

    @classmethod
    def of(cls, *args: Any) -> Self:
        q, k, _, cu_q, _, max_q, max_k, form, _ = args
        (total_q, heads, head_dim), (total_k, heads_kv, _), batch = q.shape, k.shape, max(1, len(cu_q) - 1)
        return cls(
            batch,
            heads,
            heads_kv,
            total_q,
            total_k,
            # What is said of the lengths may be loose: a buffer with room at its end, a limit instead of a maximum.
            max(min(max_q, total_q), cdiv(total_q, batch)),
            max(min(max_k, total_k), cdiv(total_k, batch)),
            head_dim,
            dtype_name(q.dtype),
            form.causal,
            "bottom_right" if form.bottom_right else "top_left",
            padded.written_window(form.left, form.right),
            form.softcap > 0,
            form.tf32,
            form.deterministic,
        )

    @property
    def form(self) -> Form:
        """One of the forms that pose this problem."""
        left, right = self._sides
        return form(
            left=left,
            right=right,
            bottom_right=self.diagonal == "bottom_right",
            softcap=SOFTCAP if self.softcap else 0.0,
            tf32=self.tf32,
            deterministic=self.deterministic,
        )

    def lengths(self, seed: int) -> tuple[list[int], list[int]]:
        """Queries and keys of each sequence: with seed 0 all tokens are used, as `cost` counts them.

        With others some stay behind the last sequence; one sequence has no queries then, and one no keys.
        """
        source = random.Random(f"pack {seed}")
        n_q = _shared_out(self.total_q, self.max_q, self.batch, source)
        alike = (self.total_q, self.max_q) == (self.total_k, self.max_k)
        n_k = list(n_q) if alike else _shared_out(self.total_k, self.max_k, self.batch, source)
        if seed and self.batch > 1:
            n_q[-1] = n_k[0] = 0
        return n_q, n_k

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        source = generator(device, seed)

        query, key = ((self.total_q, self.heads, self.head_dim), (self.total_k, self.heads_kv, self.head_dim))
        q, k, v = (normal(shape, source, device, self.torch_dtype) for shape in (query, key, key))
        cu_q, cu_k = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in self.lengths(seed)
        )
        return q, k, v, cu_q, cu_k, self.max_q, self.max_k, self.form, self.head_dim**-0.5

    def _padded(self, batch: int, seq_q: int, seq_k: int, diagonal: str) -> padded.ForwardProblem:
        return self.PART(
            batch,
            self.heads,
            self.heads_kv,
            seq_q,
            seq_k,
            self.head_dim,
            self.dtype,
            self.causal,
            diagonal,
            self.window,
            self.softcap,
            tf32=self.tf32,
        )

    @functools.cached_property
    def parts(self) -> Sequence[padded.ForwardProblem]:
        """What each sequence would be by itself, those without queries or keys left out."""
        return [
            self._padded(1, n_q, n_k, self.diagonal) for n_q, n_k in zip(*self.lengths(0), strict=True) if n_q * n_k
        ]

    @functools.cached_property
    def even(self) -> padded.ForwardProblem:
        """As many tokens in sequences of equal length: what fits a GPU and is worth trying there is so for the pack."""
        return self._padded(cdiv(self.total_q, self.max_q), self.max_q, self.max_k, "top_left")

    def cost(self) -> Cost:
        costs = [part.cost() for part in self.parts]
        return Cost(sum(each.flops for each in costs), sum(each.bytes for each in costs))

    def check(self) -> None:
        bounds.varlen(self)

    def neighbours(self) -> Sequence[Self]:
        group = self.heads // self.heads_kv
        left, right = self._sides
        # Or it would reach past the ends of short sequences.
        window = padded.written_window(min(left, 100), min(right, 60))
        few = replace(self, batch=8, heads=2 * group, heads_kv=2, window=window)
        longer = min(max(1024, 2 * max(self.max_q, self.max_k)), 32768)
        return (
            replace(few, total_q=1024, total_k=1024, max_q=512, max_k=512),
            replace(few, total_q=512, total_k=1024, max_q=256, max_k=512),
            replace(few, total_q=2 * longer, total_k=2 * longer, max_q=longer, max_k=longer),
        )

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B4,H2,T256,S128,D64,causal", "bf16"),
            ("B4,H2,T128,S64,D32", "fp16"),
            ("B1,H2,T128,S128,D64", "bf16"),
            ("B8,H4,Hkv2,T128,Tk256,S64,Sk128,D32,causal", "bf16"),
            ("B2,H1,T256,Tk64,S128,Sk64,D64,causal", "fp16"),
            ("B2,H1,T64,Tk256,S64,Sk256,D64,causal,top_left", "bf16"),
            ("B4,H2,T256,S128,D32,causal,window40x0", "bf16"),
            ("B4,H2,Hkv1,T128,Tk256,S64,Sk128,D32,window30x9", "fp16"),
            ("B4,H2,T128,S64,D72,causal", "bf16"),
            ("B16,H2,Hkv1,T32,S16,D16,causal", "bf16"),
            ("B2,H1,T64,S64,D256", "bf16"),
            ("B2,H2,T64,S64,D32,causal,softcap", "bf16"),
            ("B2,H2,T64,S64,D32,causal", "fp32"),
            ("B2,H1,T64,S64,D64,tf32", "fp32"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        # 16,384 tokens, hidden size 2048, in sequences of 512 and of 2048 tokens on average; a prefill in chunks; a
        # pack of a model with grouped heads.
        texts = [
            f"B{batch},H{2048 // d},T16384,S{longest},D{d}{mask}"
            for d in (64, 128)
            for mask in ("", ",causal")
            for batch, longest in ((32, 2048), (8, 8192))
        ]
        texts += ["B8,H32,Hkv8,T4096,Tk32768,S1024,Sk8192,D128,causal", "B32,H32,Hkv8,T32768,S8192,D128,causal"]
        return {"varlen": [cls.parse(text, "bf16") for text in texts]}


@dataclass(frozen=True)
class BackwardProblem(ForwardProblem):
    """Also do and o (T, H, D) and lse (H, T) in fp32."""

    PART: ClassVar[type[padded.ForwardProblem]] = padded.BackwardProblem

    @classmethod
    def of(cls, *args: Any) -> Self:
        _, q, k, v, _, _, *rest = args
        return super().of(q, k, v, *rest)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        q, k, v, cu_q, cu_k, *rest = super().inputs(device, seed)
        if q.is_meta:  # the lengths are not there to be read
            o, lse = torch.empty_like(q), torch.empty(q.shape[1::-1], dtype=torch.float32, device=device)
        else:  # exact: eager PyTorch would round the scores to 16 bits
            o, lse = eager.forward(attention.forward, q.float(), k.float(), v.float(), cu_q, cu_k, *rest[2:])
        do = normal(q.shape, generator(device, seed + 1), device, q.dtype)
        return do, q, k, v, o.to(q.dtype), lse, cu_q, cu_k, *rest
