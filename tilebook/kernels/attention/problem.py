"""The problems that attention poses, forward and backward, and the suites to tune."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from tilebook import bounds, models
from tilebook.kernels.attention.form import Form, banded, extras, form, limits, simplest
from tilebook.op import Cost, Problem, choice, demand, dtype_name, flag, generator, normal, pattern, size
from tilebook.problem import next_power_of_2

WINDOW = r"window(\d{1,9})?x(\d{1,9})?"
"""How a window is written: columns to the left and to the right of the diagonal, no number for no limit."""

_BIAS = r"(mask|bias|dbias)(b?h?q?k?)"

_PADDED, _HALVES = form(bias="mask"), ("bf16", "fp16")

# What inputs are made with; no verdict depends on it.
_SOFTCAP, _DROPOUT, _SHOWN = 3.0, 0.2, 0.8


def read_window(text: str) -> tuple[int, int]:
    """Columns to the left and to the right of the diagonal that a window names, -1 without limit."""
    found = re.fullmatch(WINDOW, text or "windowx")
    if found is None:
        raise ValueError(f"{text!r} is no window")
    left, right = (-1 if side is None else int(side) for side in found.groups())
    return left, right


def written_window(left: int, right: int) -> str:
    """How a window is written; empty where the limits are none, or those of a causal mask."""
    sides = "x".join("" if side < 0 else str(side) for side in (left, right))
    return f"window{sides}" if left >= 0 or right > 0 else ""


def _clamped(start: int, count: int, most: int) -> int:
    """The sum of `count` numbers from `start` on, each no less than 0 and no more than `most`."""

    def below(end: int) -> int:
        rising = min(max(end, 0), most)
        return rising * (rising - 1) // 2 + max(end - most, 0) * most

    return below(start + count) - below(start)


@dataclass(frozen=True)
class ForwardProblem(Problem):
    """q (B, H, Sq, D), k and v (B, Hkv, Sk, D), and what a `Form` says.

    window: "window128x0" reaches 128 columns to the left of the diagonal and none to the right; no number is no limit.
    bias:   "mask…" is boolean, "bias…" is added, "dbias…" also has a gradient; the letters, of b, h, q and k, name the
            axes along which it is not broadcast.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset({"head_dim"})
    TRANSFER: ClassVar[float] = 0.65
    GRADIENTS: ClassVar[bool] = False

    batch: int = size("B")
    heads: int = size("H")
    heads_kv: int = size("Hkv", like="heads")
    seq_q: int = size("S")
    seq_k: int = size("Sk", like="seq_q")
    head_dim: int = size("D")
    dtype: str = "bf16"
    causal: bool = flag()
    diagonal: str = choice("top_left", "bottom_right", elided=True)
    window: str = pattern(WINDOW, "window[left]x[right]")
    softcap: bool = flag(elided=True)
    bias: str = pattern(_BIAS, "mask[b][h][q][k]|bias…|dbias…")
    alibi: bool = flag(elided=True)
    dropout: bool = flag(elided=True)
    tf32: bool = flag(elided=True)
    deterministic: bool = demand()

    def __post_init__(self) -> None:
        """One problem, one key: limits that hide nothing are left out, and so are a bias's axes of length 1."""
        left, right = self._sides
        left, right, corner = simplest(self.seq_q, self.seq_k, left, right, self.diagonal == "bottom_right")
        kind, axes = self._kind_and_axes
        lengths = {"b": self.batch, "h": self.heads, "q": self.seq_q, "k": self.seq_k}
        values = {
            "causal": right == 0,
            "diagonal": "bottom_right" if corner else "top_left",
            "window": written_window(left, right),
            "bias": kind + "".join(axis for axis in axes if lengths[axis] > 1),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def _sides(self) -> tuple[int, int]:
        """Columns to the left and to the right of the diagonal, -1 without limit."""
        left, right = read_window(self.window)
        return left, 0 if self.causal else right

    @property
    def _kind_and_axes(self) -> tuple[str, str]:
        found = re.fullmatch(_BIAS, self.bias)
        if found is None:
            if self.bias:
                raise ValueError(f"{self.bias!r} is no bias")
            return "", ""
        kind, axes = found.groups()
        return kind if self.GRADIENTS else kind.removeprefix("d"), axes

    @classmethod
    def of(cls, *args: Any) -> Self:
        q, k, _, form, _, *tensors = args
        batch, heads, seq_q, head_dim = q.shape
        bias, _, _ = extras(form, tensors)
        axes = "" if bias is None else "".join(axis for axis, n in zip("bhqk", bias.shape, strict=True) if n > 1)
        return cls(
            batch,
            heads,
            k.shape[1],
            seq_q,
            k.shape[2],
            head_dim,
            dtype_name(q.dtype),
            form.causal,
            "bottom_right" if form.bottom_right else "top_left",
            written_window(form.left, form.right) if banded(form) else "",
            form.softcap > 0,
            form.bias + axes,
            form.alibi,
            form.dropout > 0,
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
            softcap=_SOFTCAP if self.softcap else 0.0,
            bias=self._kind_and_axes[0],  # type: ignore[arg-type]
            alibi=self.alibi,
            dropout=_DROPOUT if self.dropout else 0.0,
            tf32=self.tf32,
            deterministic=self.deterministic,
        )

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        source = generator(device, seed)
        query, key = self._shapes()

        q, k, v = (normal(shape, source, device, self.torch_dtype) for shape in (query, key, key))
        tensors = []
        kind, axes = self._kind_and_axes
        if kind:
            bias = normal(self._bias_shape, source, device, self.torch_dtype)
            if kind == "mask":
                keys = "k" in axes and "q" not in axes
                bias = self._padding(bias, source, seed) if keys else self._mask(bias, source, "q" in axes)
            tensors.append(bias)
        if self.alibi:
            tensors.append(self._slopes(q.device))
        if self.dropout:
            seed_of_call = torch.empty(1, dtype=torch.int64, device=device)
            tensors.append(seed_of_call if q.is_meta else seed_of_call.random_(1 << 62, generator=source))
        return q, k, v, self.form, self.head_dim**-0.5, *tensors

    def _mask(self, like: torch.Tensor, source: torch.Generator | None, rows: bool) -> torch.Tensor:
        """True for most pairs; with `rows`, one of them sees nothing."""
        if like.is_meta:
            return torch.empty_like(like, dtype=torch.bool)
        mask = torch.rand(like.shape, generator=source, device=like.device) < _SHOWN
        if rows:
            mask[:, :, self.seq_q // 2] = False
        return mask

    def _padding(self, like: torch.Tensor, source: torch.Generator | None, seed: int) -> torch.Tensor:
        """Of keys: sequences of a quarter to all of the length, then nothing; for odd seeds every third begins with the
        nothing, and every third has gaps instead."""
        if like.is_meta:
            return torch.empty_like(like, dtype=torch.bool)
        lead, n = like.shape[:-1], like.shape[-1]
        lengths = (torch.rand((*lead, 1), generator=source, device=like.device) * 0.75 + 0.25) * n
        mask = torch.arange(n, device=like.device) < lengths.ceil()
        if seed % 2:
            which = torch.arange(lead.numel(), device=like.device).view(*lead, 1) % 3
            gaps = torch.rand(like.shape, generator=source, device=like.device) < _SHOWN
            mask = torch.where(which == 0, mask, torch.where(which == 1, mask.flip(-1), gaps))
        return mask

    def _slopes(self, device: torch.device) -> torch.Tensor:
        """Those of the paper (Press et al. 2022)."""
        if device.type == "meta":
            return torch.empty(self.heads, device=device)
        return 2.0 ** (-8.0 * torch.arange(1, self.heads + 1, device=device) / self.heads)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (
            (self.batch, self.heads, self.seq_q, self.head_dim),
            (self.batch, self.heads_kv, self.seq_k, self.head_dim),
        )

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        _, axes = self._kind_and_axes
        lengths = (self.batch, self.heads, self.seq_q, self.seq_k)
        return tuple(n if axis in axes else 1 for axis, n in zip("bhqk", lengths, strict=True))

    @property
    def width(self) -> int:
        """The head dimension as tiles have it: the next power of two."""
        return int(next_power_of_2(self.head_dim))

    @property
    def companions(self) -> int:
        """Registers that a kernel needs for each score beside it: bias and address, random bits, a derivative."""
        return 2 * bool(self.bias) + 2 * self.dropout + self.softcap

    @property
    def table_itemsize(self) -> int:
        """Bytes of an element of the bias or mask where it passes through shared memory, at most."""
        return 4 if self.bias else 0

    @property
    def exact(self) -> bool:
        """Are products in full fp32, which tensor cores do not have?"""
        return self.dtype == "fp32" and not self.tf32

    @property
    def keys_alone(self) -> bool:
        """Is there a mask of the keys of each sequence, and nothing else that hides or changes scores, in 16 bits?"""
        return self.bias == "maskbk" and self.form == _PADDED and self.dtype in _HALVES

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """Row i sees columns i - before … i + after; None is without limit."""
        return limits(self.form, self.seq_q, self.seq_k)

    @functools.cached_property
    def pairs(self) -> float:
        """Unmasked (row, column) pairs of one head: the area under a causal mask's edge, so that its square is half."""
        before, after = self.limits
        if before is None and after is None:
            return self.seq_q * self.seq_k
        if before is None and after == 0:
            square = min(self.seq_q, self.seq_k)
            return square * square / 2 + (self.seq_q - square) * self.seq_k
        last = self.seq_q * self.seq_k if after is None else _clamped(after + 1, self.seq_q, self.seq_k)
        return float(last - (0 if before is None else _clamped(-before, self.seq_q, self.seq_k)))

    @property
    def queries(self) -> int:
        """Rows of q over all heads."""
        return self.batch * self.heads * self.seq_q

    @property
    def _bytes(self) -> tuple[float, float, float]:
        """Of one tensor shaped like q, of one shaped like k, and of the bias."""
        width = self.torch_dtype.itemsize
        query, key = (math.prod(shape) * width for shape in self._shapes())
        kind, _ = self._kind_and_axes
        bias = math.prod(self._bias_shape) * (1 if kind == "mask" else width) if kind else 0
        return query, key, bias

    def cost(self) -> Cost:
        query, key, bias = self._bytes
        moved = 2 * query + 2 * key + bias + 4 * self.queries
        return Cost(4 * self.batch * self.heads * self.pairs * self.head_dim, moved)

    def check(self) -> None:
        bounds.attention(self)

    def like(self, measured: Problem) -> bool:
        """Under masks of keys alone, by which PyTorch's kernels skip nothing: about as long, half as many blocks."""
        if not isinstance(measured, type(self)) or self.head_dim != measured.head_dim:
            return False
        for each in (self, measured):
            if not each.keys_alone or each.heads != each.heads_kv or each.seq_q != each.seq_k:
                return False
        longer, more = self.seq_q / measured.seq_q, self.queries / measured.queries
        return 0.25 <= longer <= 4 and 0.5 <= more <= 16

    def neighbours(self) -> Sequence[Self]:
        group = self.heads // self.heads_kv
        left, right = self._sides
        window = written_window(min(left, 100), min(right, 60))  # or it would reach past the ends of short sequences
        few = replace(self, batch=2, heads=2 * group, heads_kv=2, window=window)
        longest = 4096 if "q" in self._kind_and_axes[1] else 32768  # such a bias grows with the square
        longer = min(max(1024, 2 * max(self.seq_q, self.seq_k)), longest)
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
            ("B1,H2,S100,D72,causal", "bf16"),
            ("B1,H2,Hkv1,S40,Sk70,D96", "fp16"),
            ("B1,H1,S33,D160", "bf16"),
            ("B1,H2,S70,Sk197,D32,causal,bottom_right", "bf16"),
            ("B1,H1,S197,Sk100,D64,causal,bottom_right", "bf16"),
            ("B1,H2,S197,D32,causal,window40x0", "bf16"),
            ("B1,H4,Hkv2,S100,Sk150,D32,bottom_right,window70x9", "fp16"),
            ("B1,H1,S100,D64,softcap", "bf16"),
            ("B2,H3,S70,Sk100,D32,alibi", "bf16"),
            ("B2,H2,S70,D32,dbiashqk", "bf16"),
            ("B2,H4,Hkv2,S40,Sk100,D32,causal,dbiasbhqk", "fp16"),
            ("B2,H2,S70,D32,maskbk", "bf16"),
            ("B2,H4,Hkv2,S70,D32,causal,maskbk", "bf16"),
            ("B2,H2,S40,Sk70,D64,maskqk", "fp16"),
            ("B1,H2,S100,D32,dropout", "bf16"),
            ("B1,H2,S70,D32,causal,window50x0,softcap,biasq,alibi,dropout", "bf16"),
            ("B1,H2,S50,D32,causal", "fp32"),
            ("B1,H1,S40,D64,tf32", "fp32"),
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
        found = {name: [cls.parse(text, "bf16") for text in texts] for name, texts in
                 (("quick", quick), ("seeds", seeds), ("fa", fa))}  # fmt: skip
        return {**found, "models": list(dict.fromkeys(cls.parse(*each) for each in models.shapes("attention")))}


@dataclass(frozen=True)
class BackwardProblem(ForwardProblem):
    """Also do and o (B, H, Sq, D) and lse (B, H, Sq) in fp32."""

    GRADIENTS: ClassVar[bool] = True
    TRANSFER: ClassVar[float] = 0.78

    def like(self, measured: Problem) -> bool:
        """Of heads up to 64 wide: wider ones are slower than PyTorch's where next to nothing is hidden."""
        return self.head_dim <= 64 and super().like(measured)

    @classmethod
    def of(cls, *args: Any) -> Self:
        _, q, k, v, _, _, *rest = args
        return super().of(q, k, v, *rest)

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        from tilebook.kernels.attention.peers.torch import (
            forward as torch_forward,  # which judges problems, and so is later
        )

        q, k, v, *rest = super().inputs(device, seed)
        if q.is_meta:  # there is nothing to compute with
            o, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=device)
        elif self.form.plain:
            o, lse = torch_forward(q, k, v, *rest)
        else:  # eager PyTorch rounds the scores to 16 bits: its log-sum-exp is not that of the kernels' scores
            o, lse = torch_forward(q.float(), k.float(), v.float(), *rest)
            o = o.to(q.dtype)
        do = normal(q.shape, generator(device, seed + 1), device, q.dtype)
        return do, q, k, v, o, lse, *rest

    def cost(self) -> Cost:
        query, key, bias = self._bytes
        moved = 4 * query + 4 * key + bias * (2 if self.bias.startswith("d") else 1) + 4 * self.queries
        return Cost(2.5 * super().cost().flops, moved)
