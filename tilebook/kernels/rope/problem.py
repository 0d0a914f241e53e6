"""The problems that rotary position embedding poses, and the suites to tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from tilebook import bounds, op
from tilebook.op import Cost
from tilebook.problem import next_power_of_2

TRAINED = (
    "B4,H32,Hkv8,S2048,D64", "B4,H32,Hkv8,S2048,D128", "B4,H32,S2048,D128", "B1,H32,Hkv8,S8192,D128",
    "B8,H14,Hkv2,S2048,D64", "B1,H28,Hkv4,S8192,D128", "B1,H16,Hkv8,S8192,D256", "B4,H32,S2048,D96",
    "B4,H32,S2048,D80,R32",
)  # fmt: skip
"""Of Llama-3.2 1B, Llama-3 8B, Llama-2 7B, Mistral 7B, Qwen2 0.5B and 7B, Gemma-2 9B, Phi-3 mini, Phi-2."""

_LIKE, _WIDE = 1 << 22, 64
"""Numbers of q, and of a head, from which on a rotation is like another."""

_MOST_ELEMENTS = 1 << 26
"""Of q in a neighbour: verification must stay cheap."""


@dataclass(frozen=True)
class Rope(op.Problem):
    """`batch` sequences of `seq` tokens with heads of q and k; calls round both up to powers of two.

    rotated: of how many of a head's numbers there are angles; the others pass. interleaved: are numbers side by side a
    pair, and not those half of `rotated` apart?
    """

    EXACT = frozenset({"heads", "heads_kv", "head_dim", "rotated"})
    TRANSFER = 0.5

    dtype: str
    batch: int = op.size("B")
    heads: int = op.size("H")
    heads_kv: int = op.size("Hkv", like="heads")
    seq: int = op.size("S")
    head_dim: int = op.size("D")
    rotated: int = op.size("R", like="head_dim")
    interleaved: bool = op.flag(elided=True)

    def check(self) -> None:
        bounds.rope(self)

    def like(self, measured: op.Problem) -> bool:
        """Heads that are wholly rotated, not narrow, and so many numbers that no GPU waits for work."""
        if not isinstance(measured, Rope) or type(measured) is not type(self):
            return False
        forms = [(each.dtype, each.interleaved) for each in (self, measured)]
        whole = all(each.rotated == each.head_dim >= _WIDE and not each.head_dim % 16 for each in (self, measured))
        large = min(each.batch * each.seq * each.heads * each.head_dim for each in (self, measured)) >= _LIKE
        return forms[0] == forms[1] and whole and large

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Self:
        batch, heads, seq, width = q.shape
        return cls(
            op.dtype_name(q.dtype), next_power_of_2(batch), heads, k.shape[1], next_power_of_2(seq), width,
            cos.shape[-1], bool(interleaved),
        )  # fmt: skip

    def neighbours(self) -> Sequence[Self]:
        more = min(2 * self.seq, _MOST_ELEMENTS // (self.batch * self.heads * self.head_dim))
        lengths = [333, 1, *([more] if more > self.seq else [])]
        return [dataclasses.replace(self, batch=min(self.batch, 3), seq=each) for each in lengths if each != self.seq]

    @classmethod
    def examples(cls) -> Sequence[Self]:
        texts = (
            ("B2,H4,Hkv2,S16,D64", "bf16"),
            ("B1,H3,S17,D48", "fp16"),
            ("B3,H2,S7,D32,R16", "bf16"),
            ("B1,H1,S1,D2", "fp32"),
            ("B2,H4,Hkv1,S9,D64,interleaved", "bf16"),
            ("B1,H5,S7,D40,R24,interleaved", "fp32"),
            ("B2,H8,Hkv2,S8,D128", "fp32"),
            ("B1,H2,S4,D80,R32", "fp16"),
        )
        return [cls.parse(text, dtype) for text, dtype in texts]

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        return {"training": [cls.parse(text, "bf16") for text in TRAINED]}

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """q and k as layers make them, (B, S, H, D) transposed; cos and sin (1, S, R) in their dtype."""
        source = op.generator(device, seed)
        q, k = (
            op.normal((self.batch, self.seq, heads, self.head_dim), source, device, torch.float32)
            .to(self.torch_dtype)
            .transpose(1, 2)
            for heads in (self.heads, self.heads_kv)
        )
        if q.is_meta:
            cos, sin = (torch.empty(1, self.seq, self.rotated, dtype=q.dtype, device=device) for _ in range(2))
            return q, k, cos, sin, self.interleaved
        angles = torch.rand(1, self.seq, self.rotated // 2, generator=source, device=device) * 6.3
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
        return q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype), self.interleaved

    def cost(self) -> Cost:
        heads, tokens = self.heads + self.heads_kv, self.batch * self.seq
        moved = 2 * tokens * heads * self.head_dim + 2 * self.seq * self.rotated
        return Cost(3.0 * tokens * heads * self.rotated, float(self.torch_dtype.itemsize * moved))


@dataclass(frozen=True)
class Problem(Rope):
    """q, k, cos, sin, interleaved → both rotated."""


@dataclass(frozen=True)
class BackwardProblem(Rope):
    """dq and dk of the rotated, cos, sin, interleaved → dq and dk."""
