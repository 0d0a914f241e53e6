"""The problems that attention poses, forward and backward, and the suites to tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from tilebook.op import Cost, Problem, UsageError, dtype_name, flag, generator, size


@dataclass(frozen=True)
class ForwardProblem(Problem):
    """q (B, H, Sq, D), k and v (B, Hkv, Sk, D); causal means row ≥ column."""

    EXACT: ClassVar[frozenset[str]] = frozenset({"head_dim"})

    batch: int = size("B")
    heads: int = size("H")
    heads_kv: int = size("Hkv", like="heads")
    seq_q: int = size("S")
    seq_k: int = size("Sk", like="seq_q")
    head_dim: int = size("D")
    dtype: str = "bf16"
    causal: bool = flag()

    @classmethod
    def of(cls, *args: Any) -> Self:
        q, k, _, causal, _ = args
        batch, heads, seq_q, head_dim = q.shape
        return cls(batch, heads, k.shape[1], seq_q, k.shape[2], head_dim, dtype_name(q.dtype), causal)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        source = generator(device, seed)
        query, key = self._shapes()
        q, k, v = (
            torch.randn(shape, generator=source, device=device, dtype=self.torch_dtype) for shape in (query, key, key)
        )
        return q, k, v, self.causal, self.head_dim**-0.5

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            (self.batch, self.heads, self.seq_q, self.head_dim),
            (self.batch, self.heads_kv, self.seq_k, self.head_dim),
        )

    @property
    def pairs(self) -> float:
        """Unmasked (row, column) pairs of one head: the area under the mask's edge, so that a causal square is half."""
        if not self.causal:
            return self.seq_q * self.seq_k
        square = min(self.seq_q, self.seq_k)
        return square * square / 2 + (self.seq_q - square) * self.seq_k

    @property
    def queries(self) -> int:
        """Rows of q over all heads."""
        return self.batch * self.heads * self.seq_q

    @property
    def _bytes(self) -> tuple[float, float]:
        """Of one tensor shaped like q, and of one shaped like k."""
        width = self.torch_dtype.itemsize
        query, key = (math.prod(shape) * width for shape in self._shapes())
        return query, key

    def cost(self) -> Cost:
        query, key = self._bytes
        return Cost(4 * self.batch * self.heads * self.pairs * self.head_dim, 2 * query + 2 * key + 4 * self.queries)

    def check(self) -> None:
        if self.heads % self.heads_kv:
            raise UsageError(f"{self.heads} query heads are not a multiple of {self.heads_kv} key/value heads")
        if not 16 <= self.head_dim <= 256:
            raise UsageError(f"head dimension {self.head_dim} lies outside 16 … 256")

    def neighbours(self) -> Sequence[Self]:
        group = self.heads // self.heads_kv
        few = replace(self, batch=2, heads=2 * group, heads_kv=2)
        longer = min(max(1024, 2 * max(self.seq_q, self.seq_k)), 32768)
        # Ragged in both lengths, with whole blocks before the ragged one for every block size. Then longer; where that
        # costs little, with more blocks than a GPU runs at once.
        return (
            replace(few, seq_q=453, seq_k=453),
            replace(few, seq_q=197, seq_k=333),
            replace(few, seq_q=longer, seq_k=longer, batch=9 if longer <= 2048 else 1),
        )

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B2,H2,S1,D64", "bf16"),
            ("B1,H2,S17,D16,causal", "bf16"),
            ("B1,H2,S100,D64", "fp16"),
            ("B2,H1,S197,D64", "bf16"),
            ("B1,H2,S197,D64,causal", "bf16"),
            ("B1,H1,S128,D128,causal", "fp16"),
            ("B1,H1,S197,D128", "bf16"),
            ("B1,H1,S17,Sk197,D64,causal", "bf16"),
            ("B1,H1,S197,Sk100,D64,causal", "fp16"),
            ("B1,H8,Hkv1,S33,Sk70,D32", "bf16"),
            ("B2,H8,Hkv2,S40,D32,causal", "bf16"),
            ("B1,H1,S40,D256", "bf16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        quick = ("B8,H6,S196,D64", "B4,H16,S4096,D128,causal")
        seeds = [
            "B8,H6,S196,D64",
            "B16,H12,S256,D64",
            *(f"B1,H16,S{s},D64" for s in (2048, 4096, 8192, 16384)),
            *(f"B4,H32,S{s},D64" for s in (1024, 2048, 4096, 8192, 16384)),
        ]
        # The grid of the FlashAttention papers: 16,384 tokens, hidden size 2048.
        fa = [
            f"B{16384 // s},H{2048 // d},S{s},D{d}{mask}"
            for d in (64, 128)
            for mask in ("", ",causal")
            for s in (512, 1024, 2048, 4096, 8192, 16384)
        ]
        return {name: [cls.parse(text, "bf16") for text in texts] for name, texts in
                (("quick", quick), ("seeds", seeds), ("fa", fa))}  # fmt: skip


@dataclass(frozen=True)
class BackwardProblem(ForwardProblem):
    """Also do and o (B, H, Sq, D) and lse (B, H, Sq) in fp32."""

    @classmethod
    def of(cls, *args: Any) -> Self:
        _, q, k, v, _, _, causal, scale = args
        return super().of(q, k, v, causal, scale)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        from tilebook.kernels.attention.peers import torch_forward  # peers judge problems, so they import this module

        q, k, v, causal, scale = super().inputs(device, seed)
        o, lse = torch_forward(q, k, v, causal, scale)
        source = generator(device, seed + 1)
        do = torch.randn(q.shape, generator=source, device=device, dtype=q.dtype)
        return do, q, k, v, o, lse, causal, scale

    def cost(self) -> Cost:
        query, key = self._bytes
        return Cost(2.5 * super().cost().flops, 4 * query + 4 * key + 4 * self.queries)
