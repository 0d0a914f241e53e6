"""The problems that decoding poses, and the suites to tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from tilebook import bounds, models
from tilebook.op import Cost, Problem, choice, dtype_name, flag, generator, normal, size
from tilebook.problem import cdiv, next_power_of_2

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes of a paged cache that shapes on the command line can name; calls may have others."""

SOFTCAP = 2.0
"""What the scores of a capped problem's random inputs are capped at: low enough to tell."""


@dataclass(frozen=True)
class DecodeProblem(Problem):
    """q (B, H, S, D) against k and v of up to Sk keys, (B, Hkv, Sk, D) or paged (blocks, block size, Hkv, D).

    Caches grow by a key a step, so calls round Sk up to a power of two: one verdict serves the bucket. A `window` as
    long as Sk is none. Paged sequences always have lengths of their own, contiguous ones where they are `ragged`.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"head_dim"})
    HALVED: ClassVar[frozenset[str]] = frozenset({"seq_k", "window"})  # where there is no window they are one

    batch: int = size("B")
    heads: int = size("H")
    heads_kv: int = size("Hkv", like="heads")
    seq_q: int = size("S")
    seq_k: int = size("Sk")
    window: int = size("W", like="seq_k")
    head_dim: int = size("D")
    dtype: str = "bf16"
    cache: str = choice("contiguous", *(f"paged{n}" for n in BLOCK_SIZES))
    ragged: bool = flag()
    causal: bool = flag()
    capped: bool = flag()

    def __post_init__(self) -> None:
        # The last query sees every key, so that one query row is the same with and without the mask.
        object.__setattr__(self, "causal", self.causal and self.seq_q > 1)
        object.__setattr__(self, "window", min(self.window, self.seq_k))

    @classmethod
    def of(cls, *args: Any) -> Self:
        q, k, _, seq_lens, block_table, causal, _, softcap, window = args
        batch, heads, seq_q, head_dim = q.shape
        paged = block_table is not None
        heads_kv, longest = (k.shape[2], block_table.shape[1] * k.shape[1]) if paged else k.shape[1:3]
        seq_k = next_power_of_2(longest)
        return cls(
            batch,
            heads,
            heads_kv,
            seq_q,
            seq_k,
            seq_k if window is None or window >= longest else window,
            head_dim,
            dtype_name(q.dtype),
            f"paged{k.shape[1]}" if paged else "contiguous",
            seq_lens is not None and not paged,
            causal,
            softcap > 0,
        )

    @property
    def block_size(self) -> int:
        """Keys in a block of the paged cache, 0 where it is contiguous."""
        return int(self.cache.removeprefix("paged")) if self.cache != "contiguous" else 0

    @property
    def rows(self) -> int:
        """Query rows that share the keys and values of one head."""
        return self.heads // self.heads_kv * self.seq_q

    @property
    def keys(self) -> int:
        """Keys of a full sequence that some query row sees."""
        return min(self.seq_k, self.window + self.seq_q - 1)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """Sequences are full with seed 0, as `cost` counts them; with others their lengths are random, one is 0."""
        source = generator(device, seed)

        def random(*shape: int) -> torch.Tensor:
            return normal(shape, source, device, self.torch_dtype)

        q = random(self.batch, self.heads, self.seq_q, self.head_dim)
        lens = table = None
        if self.block_size or self.ragged:
            lens = torch.full((self.batch,), self.seq_k, dtype=torch.int32, device=device)
        if lens is not None and seed:
            lens.random_(self.seq_k + 1, generator=source)[-1] = 0
        if self.block_size:
            blocks = cdiv(self.seq_k, self.block_size)
            # One block more than the sequences hold, anywhere among them.
            order = torch.randperm(self.batch * blocks + 1, generator=source, device=device)
            table = order[1:].view(self.batch, blocks).to(torch.int32)
            shape = len(order), self.block_size, self.heads_kv, self.head_dim
        else:
            shape = self.batch, self.heads_kv, self.seq_k, self.head_dim
        window = self.window if self.window < self.seq_k else None
        softcap = SOFTCAP if self.capped else 0.0
        return q, random(*shape), random(*shape), lens, table, self.causal, self.head_dim**-0.5, softcap, window

    def cost(self) -> Cost:
        """Every visible key and value read once, q read, o and lse written; a causal corner counts as visible."""
        queries, itemsize = self.batch * self.heads * self.seq_q, self.torch_dtype.itemsize
        cached = 2 * self.batch * self.heads_kv * self.keys * self.head_dim * itemsize
        return Cost(
            4.0 * queries * self.keys * self.head_dim,
            float(cached + 2 * queries * self.head_dim * itemsize + 4 * queries),
        )

    def room(self) -> float:
        """With all of the cache, of which a window reads a part."""
        whole = 2.0 * self.batch * self.heads_kv * self.seq_k * self.head_dim * self.torch_dtype.itemsize
        return max(whole, super().room())

    def check(self) -> None:
        bounds.decode(self)

    def distance(self, other: Problem) -> float:
        total = super().distance(other)
        if not isinstance(other, DecodeProblem) or self.window < self.seq_k or other.window < other.seq_k:
            return total
        return total - abs(math.log2(self.seq_k / other.seq_k))  # where there is no window it does not count as well

    def neighbours(self) -> Sequence[Self]:
        group = self.heads // self.heads_kv
        few = replace(self, batch=3, heads=2 * group, heads_kv=2)
        windowed = self.window < self.seq_k
        # Ragged lengths; one sequence shorter than all programs together, one that keeps each of them busy.
        return [replace(few, seq_k=n, window=100 if windowed else n) for n in (453, 5003)]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B2,H4,Hkv2,S1,Sk256,D64", "bf16"),
            ("B3,H8,Hkv1,S1,Sk128,D32,ragged", "fp16"),
            ("B1,H2,S16,Sk64,D16,causal", "bf16"),
            ("B2,H16,Hkv2,S5,Sk128,D64,ragged,causal", "bf16"),
            ("B3,H8,Hkv2,S1,Sk256,D64,paged16", "bf16"),
            ("B2,H4,Hkv2,S3,Sk256,D128,paged64,causal", "fp16"),
            ("B2,H2,Hkv1,S4,Sk512,D32,paged256,causal", "bf16"),
            ("B1,H4,Hkv2,S2,Sk256,D80,ragged", "bf16"),
            ("B2,H4,Hkv2,S3,Sk256,W70,D64,ragged,causal", "bf16"),
            ("B2,H2,S1,Sk256,W33,D48,paged16,capped", "bf16"),
            ("B1,H16,Hkv1,S16,Sk128,D40,causal,capped", "fp16"),
            ("B1,H2,Hkv1,S2,Sk64,D256,ragged", "bf16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        model = "B16,H32,Hkv8,S1,Sk{},D128{}".format
        decode = [
            *(model(n, cache) for cache in ("", ",paged16") for n in (8192, 16384, 32768, 65536)),
            model(16384, ",ragged"),
            model(16384, ",paged64"),
            "B64,H32,Hkv8,S1,Sk4096,D128",
            "B1,H32,Hkv8,S1,Sk131072,D128",
        ]
        found = [cls.parse(*each) for each in models.shapes("decode")]
        return {"decode": [cls.parse(text, "bf16") for text in decode], "models": found}
