"""What a call of a norm must satisfy."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_alike(x: torch.Tensor, residual: torch.Tensor) -> None:
    """Raises ValueError where the one cannot be added to the other as it is."""
    if residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point():
        told = [f"{each.dtype} {tuple(each.shape)} on {each.device}" for each in (x, residual)]
        raise ValueError(f"expected a residual like x, not {told[1]} beside {told[0]}")


def check(names: Sequence[str], x: torch.Tensor, vectors: Sequence[torch.Tensor | None]) -> None:
    """Raises ValueError for what does not go together. `names`: what the vectors are called, in schemas."""
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (…, N), not {x.dtype} {tuple(x.shape)}")
    for name, each in zip(names, vectors, strict=True):
        name = name.rstrip("?")
        if each is None:
            continue
        if each.shape != x.shape[-1:]:
            raise ValueError(f"expected x (…, N) and {name} (N,), not {tuple(x.shape)} and {tuple(each.shape)}")
        if each.device != x.device:
            raise ValueError(f"{name} is on {each.device}, but x on {x.device}")
        if not each.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {each.dtype}")
