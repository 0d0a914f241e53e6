"""What a call of `apply_rope` must satisfy."""

from __future__ import annotations

import torch

NAMES = "q", "k", "cos", "sin"


def check(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raises ValueError for what does not go together."""
    for name, each in zip(NAMES, (q, k, cos, sin), strict=True):
        if not each.is_floating_point() or each.device != q.device:
            raise ValueError(f"{name} must be floating point on {q.device}, not {each.dtype} on {each.device}")
    if q.ndim != 4 or k.ndim != 4 or (*k.shape[:1], *k.shape[2:]) != (*q.shape[:1], *q.shape[2:]):
        raise ValueError(f"expected q (B, H, S, D) and k (B, Hkv, S, D), not {tuple(q.shape)} and {tuple(k.shape)}")
    batch, _, length, width = q.shape
    fits = cos.ndim in (2, 3) and cos.shape == sin.shape and cos.shape[-2] == length
    if not fits or (cos.ndim == 3 and cos.shape[0] not in (1, batch)):
        raise ValueError(
            f"expected cos and sin ({length}, R), (1, {length}, R) or ({batch}, {length}, R) for q {tuple(q.shape)}, "
            f"not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[-1] % 2 or not 0 < cos.shape[-1] <= width:
        raise ValueError(f"cos and sin must have an even width of at most {width}, not {cos.shape[-1]}")
