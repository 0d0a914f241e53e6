"""What a call of the gated delta rule must satisfy."""

from __future__ import annotations

import torch

from tilebook.kernels.linear_attention.check import check as check_linear
from tilebook.kernels.linear_attention.check import check_step as check_linear_step


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor | None, beta: torch.Tensor,
    state: torch.Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError for tensors that do not go together."""
    check_linear(q, k, v, log_decay, state, False)
    if beta.shape != q.shape[:3] or beta.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"beta must be fp32 of shape {tuple(q.shape[:3])}; got {beta.dtype} {tuple(beta.shape)}")
    if beta.device != q.device:
        raise ValueError("all tensors must be on one device")


def check_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, log_decay: torch.Tensor | None,
    beta: torch.Tensor,
) -> None:  # fmt: skip
    """Raises ValueError for tensors of one token that do not go together with a state."""
    check_linear_step(q, k, v, state, log_decay)
    if beta.shape not in (q.shape[:2], q.shape[1:2]) or not beta.is_floating_point() or beta.device != q.device:
        raise ValueError(f"beta must be floating point of shape {tuple(q.shape[:2])} beside q; got {tuple(beta.shape)}")


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """How many heads of v each head of q and k serves. Raises ValueError where that is no whole number."""
    if not (q.ndim == k.ndim == v.ndim >= 2) or q.shape[1] != k.shape[1]:
        return 1  # which `check` names
    few, many = q.shape[1], v.shape[1]
    if few == many:
        return 1
    if not few or many % few:
        raise ValueError(f"{many} heads of v are not a multiple of {few} heads of q and k")
    return int(many // few)
