"""The ops of causal linear attention with their references, and what computes them."""

from __future__ import annotations

from typing import Any

import torch

from tilebook import inductor, op
from tilebook.kernels.linear_attention import fla, launch
from tilebook.kernels.linear_attention.problem import BackwardProblem, LinearAttention, Problem
from tilebook.kernels.linear_attention.pytorch import chunked, gradients
from tilebook.kernels.linear_attention.space import SPACE, SPACE_BWD

HOST_BOUND = 1 << 22
"""Numbers of q up to which the GPU is done with a compiled call before the host has made the next one."""


@op.define("linear_attention_fwd", Problem)
def linear_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, state: torch.Tensor | None,
    scale: float, normalize: bool, eps: float, feature_map: str = "none",
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q and k (B, H, S, D), v (B, H, S, V), g (B, H, S), state (B, H, D, V) or, normalized, (B, H, D, V + 1) → o in
    the shape of v, the last state, and the divisors (B, H, S). q and k count as what `feature_map` makes of them.
    """
    return _each(chunked, (q, k, v, g, state), (scale, normalize, eps, feature_map))


@op.define("linear_attention_bwd", BackwardProblem, direction="bwd")
def linear_attention_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, state: torch.Tensor | None, weight: torch.Tensor | None, scale: float, decayed: bool,
    feature_map: str = "none",
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """→ dq, dk, dv, and dg and the gradient of `state`, nothing where they are not there or not wanted."""
    return _each(gradients, (do, dstate, q, k, v, g, state, weight), (scale, decayed, feature_map))


def _each(function: Any, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """A function of batches, one at a time, so that what it makes of them fits into memory."""
    count = tensors[0].shape[0]
    alone = [function(*(x if x is None else x[b : b + 1] for x in tensors), *options) for b in range(count)]
    return tuple(torch.cat(parts) if parts[0].numel() else parts[0] for parts in zip(*alone, strict=True))


def supports(problem: LinearAttention) -> bool:
    """Do our kernels serve it?"""
    widths = problem.head_dim, problem.value_dim
    return problem.dtype in ("bf16", "fp16", "fp32") and all(1 <= width <= 256 for width in widths)


linear_attention_fwd.implementation("triton", space=SPACE, supports=supports)(launch.linear_attention_fwd)
linear_attention_bwd.implementation("triton", space=SPACE_BWD, supports=supports)(launch.linear_attention_bwd)
linear_attention_fwd.implementation("torch")(chunked)
linear_attention_bwd.implementation("torch")(gradients)
inductor.register(
    linear_attention_fwd, chunked, supports=lambda problem: problem.tokens * problem.head_dim > HOST_BOUND
)
linear_attention_fwd.implementation("fla", external=fla.PACKAGE, available=fla.available, supports=fla.supports)(
    fla.forward
)
linear_attention_bwd.implementation("fla", external=fla.PACKAGE, available=fla.available, supports=fla.supports)(
    fla.backward
)

linear_attention_fwd.backward = linear_attention_bwd
