"""Gated linear units in PyTorch's own functions, differentiable by its autograd: what runs where no kernel serves."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.call import recorded
from tilebook.kernels.mlp.pytorch import BOUNDS as TWO_LAYERS

HOST_BOUND = 1 << 22
"""Elements up to which the GPU is done with an eager call before the host has made the next one."""

BOUNDS = 2 / 3 * TWO_LAYERS[0], 2 / 3 * TWO_LAYERS[1]
"""Multiplications of one of the three layers up to which the host bounds an eager call: without gradients, with them.

As many as an MLP of two layers has then, all together.
"""

# Bound here once: a program may put other functions in the places of PyTorch's.
linear: Any = torch._C._nn.linear
_silu: Any = torch._C._nn.silu
_gelu: Any = torch._C._nn.gelu


def act(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation, elementwise."""
    if activation == "silu":
        return _silu(gate)  # type: ignore[no-any-return]
    return _gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")  # type: ignore[no-any-return]


def halves(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up, also where one tensor holds both."""
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, -1)
    return first, second


def plain(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> torch.Tensor:
    """h for an entry's tensors (gate, up), up None or not, and options (activation,)."""
    gate, up = halves(*tensors)
    return act(gate, options[0]) * up


def plain_block(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> torch.Tensor:
    """y for an entry's tensors (x, weights, biases), what may be None or not, and options (activation, …)."""
    x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias = tensors
    gate = linear(x, gate_weight, gate_bias)
    up = None if up_weight is None else linear(x, up_weight, up_bias)
    return linear(plain((gate, up), options), down_weight, down_bias)  # type: ignore[no-any-return]


def block(tensors: tuple[Any, ...], options: tuple[str, bool]) -> torch.Tensor:
    """The same; with options (activation, True) x alone is kept for a backward pass, where a pass can be run again."""
    if options[1] and recorded(tensors) and torch._C._functorch.peek_interpreter_stack() is None:
        from torch.utils.checkpoint import checkpoint

        again: Any = checkpoint(plain_block, tensors, options, use_reentrant=False, preserve_rng_state=False)
        return again  # type: ignore[no-any-return]
    return plain_block(tensors, options)
