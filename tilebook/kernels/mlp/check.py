"""What a call of `mlp` must satisfy."""

from __future__ import annotations

import torch


def check(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None
) -> None:
    """Raises ValueError for what does not go together."""
    if x.ndim < 1 or w1.ndim != 2 or w2.ndim != 2:
        raise ValueError(
            f"expected x (…, H), w1 (I, H) and w2 (H, I), not shapes {_shape(x)}, {_shape(w1)} and {_shape(w2)}"
        )
    inner, width = w1.shape
    if x.shape[-1] != width or w2.shape != (width, inner):
        raise ValueError(
            f"w1 {_shape(w1)} asks for x (…, {width}) and w2 ({width}, {inner}), not {_shape(x)} and {_shape(w2)}"
        )
    for name, bias, size in (("b1", b1, inner), ("b2", b2, width)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), not {_shape(bias)}")
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}")


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))
