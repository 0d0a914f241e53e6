"""Norms over the last axis. RMSNorm: y = x · rstd · weight, rstd = 1 / √(mean(x²) + eps), Zhang & Sennrich 2019."""

from __future__ import annotations

from typing import Any

import torch

from tilebook import dispatch
from tilebook.autograd import once
from tilebook.kernels.norms import pytorch
from tilebook.kernels.norms.ops import rms_norm_bwd, rms_norm_fwd
from tilebook.op import Op

__all__ = ["rms_norm"]

Vector = torch.Tensor | None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, choice: dispatch.Choice, backward: Op[Any], eps: float, x: torch.Tensor, *vectors: Vector
    ) -> torch.Tensor:
        y, *statistics = choice(x, *vectors, eps)
        ctx.save_for_backward(x, *vectors, *statistics)
        ctx.call = choice, backward, [vector is not None for vector in vectors]
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Vector, ...]:
        choice, op, there = ctx.call
        dx, *rest = choice.follow(op, (dy,), dy, *ctx.saved_tensors)
        found = iter(rest)
        return None, None, None, dx, *(next(found) if each else None for each in there)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """y = x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019, eq. 4), in fp32 inside.

    Args:
        x: (…, N), floating point; any strides, fastest where the last axis is contiguous.
        weight: (N,), in the dtype of x or another; ones if None.
        eps: added to the mean square, so that a zero vector stays one.

    Returns:
        (…, N) in the dtype of x.

    Kernels of ours run for fp16, bf16 and fp32 with N ≤ 65536 on a GPU; all else runs as plain PyTorch. Differentiable
    once in x and weight; both gradients repeat bit for bit.

    Raises:
        ValueError: a weight that does not fit x in shape or device, or tensors that are not floating point.
    """
    y = _by_kernels(rms_norm_fwd, rms_norm_bwd, x, {"weight": weight}, eps)
    return pytorch.rms(x, weight, eps) if y is None else y


def _by_kernels(
    forward: Op[Any], backward: Op[Any], x: torch.Tensor, named: dict[str, Vector], eps: float
) -> torch.Tensor | None:
    """y, or None where plain PyTorch is to compute it."""
    vectors = tuple(named.values())
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.ndim and x.numel() else x
    choice = dispatch.known(forward, flat, *vectors, eps)
    if choice is None or choice.source == "fallback":
        _check(x, named)
        usual = x.numel() and all(vector is None or vector.dtype != torch.float64 for vector in vectors)
        choice = dispatch.find(forward, flat, *vectors, eps) if usual else None
        if choice is None:
            return None
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, *vectors)):
        y: torch.Tensor = _Norm.apply(choice, backward, eps, flat, *vectors)
    else:
        y = choice(flat, *vectors, eps)[0]
    return y if x.ndim == 2 else y.view(x.shape)


def _check(x: torch.Tensor, named: dict[str, Vector]) -> None:
    if x.ndim < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (…, N), not {x.dtype} {tuple(x.shape)}")
    for name, vector in named.items():
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"expected x (…, N) and {name} (N,), not {tuple(x.shape)} and {tuple(vector.shape)}")
        if vector.device != x.device:
            raise ValueError(f"{name} is on {vector.device}, but x on {x.device}")
        if not vector.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {vector.dtype}")
