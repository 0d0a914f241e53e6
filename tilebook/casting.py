"""What autocast makes of a product's factors."""

from __future__ import annotations

from typing import Any

import torch

# Asked once: a trace cannot ask.
_AUTOCAST = tuple(
    kind for kind in ("cuda", "cpu", "xpu", "hpu", "mps", "mtia") if torch.amp.is_autocast_available(kind)
)


def autocast_on(tensor: torch.Tensor) -> bool:
    """Is autocast on for this tensor's device?"""
    kind = tensor.device.type
    return kind in _AUTOCAST and torch.is_autocast_enabled(kind)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a product's factors on this tensor's device, or None where it is off."""
    return torch.get_autocast_dtype(tensor.device.type) if autocast_on(tensor) else None


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as autocast hands them to a product: all floating point but fp64 takes its dtype."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(_cast(x, dtype) if isinstance(x, torch.Tensor) else x for x in tensors)


def factor_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast hands a tensor to a product: its own where autocast is off, or lets it be."""
    return (autocast_dtype(x) if _is_cast(x) else None) or x.dtype


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if _is_cast(x) else x


def _is_cast(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64
