"""The MLP block in PyTorch's own functions, differentiable by its autograd: what runs where no kernel serves."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def act(z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return F.relu(z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def each_alone(
    dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], ...]:
    """What computes dx, dW1, db1, dW2, db2, for when only some of them are asked for."""
    return (
        lambda: torch.mm(dz, w1),
        lambda: torch.mm(dz.t(), x),
        lambda: dz.sum(0),
        lambda: torch.mm(dy.t(), h),
        lambda: dy.sum(0),
    )
