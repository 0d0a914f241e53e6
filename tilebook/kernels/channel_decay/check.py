"""What a call with decays by channel must satisfy."""

from __future__ import annotations

import torch

from tilebook.kernels.linear_attention.check import check as check_linear


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor | None
) -> None:
    """Raises ValueError for tensors that do not go together."""
    check_linear(q, k, v, None, state, False)
    if log_decay.shape != q.shape or log_decay.dtype not in (torch.float32, torch.float64):
        got = f"{log_decay.dtype} {tuple(log_decay.shape)}"
        raise ValueError(f"log_decay of each channel must be fp32 of shape {tuple(q.shape)}; got {got}")
    if log_decay.device != q.device:
        raise ValueError("all tensors must be on one device")
