"""The ops of linear attention without an order of tokens with their references, and what computes them."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.bidirectional import launch
from tilebook.kernels.bidirectional.form import PERFORMER
from tilebook.kernels.bidirectional.problem import BackwardProblem, Bidirectional, Problem
from tilebook.kernels.bidirectional.pytorch import forward, gradients
from tilebook.kernels.bidirectional.space import SPACE


@op.define("bidirectional_linear_attention_fwd", Problem)
def bidirectional_linear_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, omega: torch.Tensor | None,
    feature_map: str, scale: float, eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q (B, H, S, D), k (B, H, K, D), v (B, H, K, V), mask (B, K), omega (·, F, D) → o (B, H, S, V), the state
    (B, H, V + 2, F) and the divisors (B, H, S).
    """
    o, *kept = forward(q, k, v, mask, omega, feature_map, scale, eps, torch.float64)
    return o, *(x.float() for x in kept)


@op.define("bidirectional_linear_attention_bwd", BackwardProblem, direction="bwd")
def bidirectional_linear_attention_bwd(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    omega: torch.Tensor | None, o: torch.Tensor, state: torch.Tensor, den: torch.Tensor, feature_map: str, scale: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """→ dq, dk and dv."""
    return gradients(do, q, k, v, mask, omega, o, state, den, feature_map, scale, eps, torch.float64)


_MOST = {"fp32": 1 << 12, "bf16": 1 << 14, "fp16": 1 << 14}
"""Numbers of Performer's directions, which each program has whole."""


def supports(problem: Bidirectional) -> bool:
    """Do our kernels serve it?"""
    widths = problem.head_dim, problem.value_dim, problem.features
    whole = problem.wide * problem.wide_features if problem.feature_map == PERFORMER else 0
    return whole <= _MOST.get(problem.dtype, -1) and all(1 <= width <= 256 for width in widths)


for _each, _ours, _theirs in (
    (bidirectional_linear_attention_fwd, launch.forward, forward),
    (bidirectional_linear_attention_bwd, launch.backward, gradients),
):
    _each.implementation("triton", space=SPACE, supports=supports)(_ours)
    _each.implementation("torch")(_theirs)

bidirectional_linear_attention_fwd.backward = bidirectional_linear_attention_bwd
