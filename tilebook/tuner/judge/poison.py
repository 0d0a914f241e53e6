"""Memory in which a candidate shows what it must not do: tensors between guard bands, poison where nobody has written.

The poison of a candidate's first run is NaN, which no arithmetic loses. But a maximum does, a comparison too: repeats
have a large number instead, and a large negative one. And all of these stay what they are when something is added to
them, as atomic operations do: another run has guard bands of plain numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GUARD = 1 << 15
"""Elements before and after every tensor, at least, that must come back untouched; keeps the tensor's alignment."""

_FARTHEST = 1 << 22  # else as many as the tensor has, up to so many

NAN, HIGH, LOW, PLAIN = range(4)
"""Kinds of poison."""

KINDS = (HIGH, LOW, NAN)
"""In the order in which repeats have them."""

INPUT, SCRATCH = 0x15, 0x2A  # told apart, so that copying one guard band into another is seen
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(_BITS[x.element_size()])


@functools.cache
def poison(dtype: torch.dtype, mark: int, kind: int = NAN) -> int:
    """The bits of a number that no arithmetic makes, where the dtype has more than one; else of a number."""
    if dtype is torch.bool:
        return int(kind in (NAN, PLAIN))
    if not dtype.is_floating_point:
        return mark if kind in (NAN, PLAIN) else mark ^ 0x3F
    value = {NAN: float("nan"), HIGH: torch.finfo(dtype).max, LOW: torch.finfo(dtype).min, PLAIN: 1.0}[kind]
    plain = int(bits(torch.full((), value, dtype=dtype)).item())
    return (plain & ~0x3F) | mark if dtype.itemsize > 1 else plain


def _inside(dtype: torch.dtype, kind: int) -> int:
    """The kind of poison of what nobody has written: where it may be a number that a kernel writes, always the same."""
    return kind if kind != PLAIN and dtype.itemsize > (1 if dtype.is_floating_point else 2) else NAN


def written(output: torch.Tensor) -> torch.Tensor:
    """Where an output is no longer what it was when it was allocated."""
    return bits(output) != poison(output.dtype, SCRATCH)


class Poisoned(TorchFunctionMode):
    """Inside it, `torch.empty` and its kin return poison between guard bands; `torch.zeros` … get bands alone."""

    _EMPTY = frozenset(
        {
            torch.empty,
            torch.empty_like,
            torch.empty_permuted,
            torch.empty_strided,
            torch.Tensor.new_empty,
            torch.Tensor.new_empty_strided,
        }
    )
    _FILLED = frozenset(
        {
            torch.full,
            torch.full_like,
            torch.ones,
            torch.ones_like,
            torch.zeros,
            torch.zeros_like,
            torch.Tensor.new_full,
            torch.Tensor.new_ones,
            torch.Tensor.new_zeros,
        }
    )

    def __init__(self, kind: int = NAN) -> None:
        super().__init__()
        self._kind = kind
        self._bands: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        filled = func in self._FILLED
        if not (filled or func in self._EMPTY) or made.device.type == "meta" or "out" in (kwargs or {}):
            return made
        return self.place(made, made if filled else None)

    def place(self, like: torch.Tensor, values: torch.Tensor | None = None, mark: int = SCRATCH) -> torch.Tensor:
        """A tensor of the same shape and strides between guard bands, poisoned or holding `values`."""
        extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
        extent = extent if like.numel() else 0
        # A write to any column of the row after the last must land in the band.
        rows = 2 * like.stride(-2) if like.ndim > 1 else 0
        guard = max(1, -(-max(rows, min(extent, _FARTHEST)) // GUARD)) * GUARD
        around = poison(like.dtype, mark, self._kind)
        kind = _BITS[like.dtype.itemsize]
        buffer = torch.full((extent + 2 * guard,), around, dtype=kind, device=like.device)
        placed = buffer.view(like.dtype).as_strided(like.shape, like.stride(), guard)
        if values is not None:
            placed.copy_(values)
        elif (inside := poison(like.dtype, mark, _inside(like.dtype, self._kind))) != around:
            buffer[guard : guard + extent] = inside
        self._bands += [(buffer[:guard], around), (buffer[-guard:], around)]
        return placed

    def guards_intact(self) -> bool:
        touched = [(band != around).any() for band, around in self._bands]
        return not torch.stack(touched).any() if touched else True

    def settle(self, outputs: Iterable[torch.Tensor]) -> None:
        """What nobody has written of these is what it would be under NaN, so that runs can be compared."""
        for output in outputs:
            kind = _inside(output.dtype, self._kind)
            if kind != NAN and bool((left := bits(output) == poison(output.dtype, SCRATCH, kind)).any()):
                bits(output)[left] = poison(output.dtype, SCRATCH)
