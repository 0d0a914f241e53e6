"""Norms over the last axis. RMSNorm: y = x · rstd · weight, rstd = 1 / √(mean(x²) + eps), Zhang & Sennrich 2019."""

from __future__ import annotations

from typing import Any

import torch

from tilebook import dispatch
from tilebook.autograd import once
from tilebook.kernels.norms.ops import rms_norm_bwd, rms_norm_fwd
from tilebook.kernels.norms.pytorch import plain

__all__ = ["rms_norm"]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, choice: dispatch.Choice
    ) -> torch.Tensor:  # fmt: skip
        y, rstd = choice(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.choice = choice
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight = ctx.choice.follow(rms_norm_bwd, (dy,), dy, *ctx.saved_tensors)
        return dx, dweight, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """y = x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019, eq. 4), in fp32 inside.

    Args:
        x: (…, N), floating point; any strides, fastest where the last axis is contiguous.
        weight: (N,), in the dtype of x or another.
        eps: added to the mean square, so that a zero vector stays one.

    Returns:
        (…, N) in the dtype of x.

    Kernels of ours run for fp16, bf16 and fp32 with N ≤ 65536 on a GPU; all else runs as plain PyTorch. Differentiable
    once in x and weight; both gradients repeat bit for bit.

    Raises:
        ValueError: a weight that does not fit x in shape or device, or tensors that are not floating point.
    """
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.ndim and x.numel() else x
    choice = dispatch.known(rms_norm_fwd, flat, weight, eps)
    if choice is None or choice.source == "fallback":
        _check(x, weight)
        usual = x.numel() and weight.dtype != torch.float64
        choice = dispatch.find(rms_norm_fwd, flat, weight, eps) if usual else None
        if choice is None:
            return plain(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y: torch.Tensor = _RMSNorm.apply(flat, weight, eps, choice)
    else:
        y = choice(flat, weight, eps)[0]
    return y if x.ndim == 2 else y.view(x.shape)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"expected x (…, N) and weight (N,), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, but x on {x.device}")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"x and weight must be floating point, not {x.dtype} and {weight.dtype}")
