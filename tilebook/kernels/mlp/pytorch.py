"""The MLP block in PyTorch's own functions, differentiable by its autograd: what runs where no kernel serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BOUNDS = float(3 << 32), float(1 << 33)
"""Multiplications of one of the two layers up to which the host bounds an eager call: without gradients, with them.

An H200 is done with so many in about 100 µs forward and 200 µs forward and backward. PyTorch's own calls cost the host
60–80 µs forward, ours up to 120: M4096 H768 I3072, 78 µs of the GPU, took 119 instead of 83.
"""

# Bound here once: a program may put other functions in the places of PyTorch's.
linear: Any = torch._C._nn.linear
_gelu: Any = torch._C._nn.gelu


def act(z: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation, elementwise."""
    if activation == "relu":
        return torch.relu(z)
    found: torch.Tensor = _gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return found


def plain(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> torch.Tensor:
    """y for an entry's tensors (x, w1, b1, w2, b2), biases None or not, and options (activation, …)."""
    x, w1, b1, w2, b2 = tensors
    y: torch.Tensor = linear(act(linear(x, w1, b1), options[0]), w2, b2)
    return y


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
