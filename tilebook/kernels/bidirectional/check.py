"""What a call must satisfy."""

from __future__ import annotations

import torch

from tilebook.kernels.bidirectional.features import check_rows, parts
from tilebook.kernels.bidirectional.form import MAPS, PERFORMER


def check_alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ValueError for q, k and v that do not go together where every token sees all."""
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or not v.shape[3]:
        raise ValueError(
            f"v must have the shape of k but for its head dimension; got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (*q.shape[:2], q.shape[3], q.dtype, q.device) != (*k.shape[:2], k.shape[3], k.dtype, k.device):
        got = ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in (("q", q), ("k", k)))
        raise ValueError(f"q and k must differ in their lengths at most; got {got}")
    if (v.dtype, v.device) != (k.dtype, k.device):
        raise ValueError(f"v must be as k is; got {v.dtype} on {v.device}, {k.dtype} on {k.device}")


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, omega: torch.Tensor | None,
    feature_map: str, scale: float, eps: float,
) -> None:  # fmt: skip
    """Raises ValueError for tensors that do not go together."""
    check_rows(q, k)
    check_alike(q, k, v)
    if mask is not None and (mask.shape != (k.shape[0], k.shape[2]) or mask.dtype not in (torch.bool, torch.float32)):
        raise ValueError(f"a mask must be (batch, keys) in bool or fp32; got {mask.dtype} {tuple(mask.shape)}")
    if feature_map not in MAPS or (feature_map == PERFORMER) != (omega is not None):
        raise ValueError(f"feature_map must be one of {', '.join(MAPS)}, with omega for {PERFORMER} alone")
    count = parts(q.dtype)
    if omega is not None and (
        omega.ndim != 3
        or (omega.shape[0], omega.shape[2], omega.dtype) != (count, q.shape[3], q.dtype)
        or not omega.shape[1]
    ):
        raise ValueError(f"omega must be ({count}, features, {q.shape[3]}) in {q.dtype}; got {tuple(omega.shape)}")
    if any(x is not None and x.device != q.device for x in (mask, omega)):
        raise ValueError("all tensors must be on one device")
