"""The ops of mLSTM's memory with their references, and what computes them."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.delta_rule.ops import exactly
from tilebook.kernels.linear_attention.ops import supports as linear_supports
from tilebook.kernels.linear_attention.problem import LinearAttention
from tilebook.kernels.mlstm import launch
from tilebook.kernels.mlstm.problem import BackwardProblem, Problem
from tilebook.kernels.mlstm.pytorch import chunked, gradients
from tilebook.kernels.mlstm.space import SPACE, SPACE_BWD


@op.define("mlstm_fwd", Problem)
def mlstm_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, log_input: torch.Tensor, floor: torch.Tensor,
    state: torch.Tensor | None, scale: float, eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q and k (B, H, S, D), v (B, H, S, V), g, log_input and floor (B, H, S), state (B, H, D, V + 1) → o in the shape
    of v, the last state, and the sums of weights (B, H, S), before their absolute values.
    """
    return exactly(chunked, (q, k, v, g, log_input, floor, state), (scale, eps))


@op.define("mlstm_bwd", BackwardProblem, direction="bwd")
def mlstm_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    log_input: torch.Tensor, state: torch.Tensor | None, weight: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """→ dq, dk, dv, dg, dlog_input, and the gradient of `state`, nothing where there is none."""
    return exactly(gradients, (do, dstate, q, k, v, g, log_input, state, weight), (scale,))


def supports(problem: LinearAttention) -> bool:
    """Do our kernels serve it? fp32 tiles of wider heads do not fit into registers."""
    return linear_supports(problem) and (problem.dtype != "fp32" or problem.head_dim <= 128)


mlstm_fwd.implementation("triton", space=SPACE, supports=supports)(launch.mlstm_fwd)
mlstm_bwd.implementation("triton", space=SPACE_BWD, supports=supports)(launch.mlstm_bwd)
mlstm_fwd.implementation("torch")(chunked)
mlstm_bwd.implementation("torch")(gradients)

mlstm_fwd.backward = mlstm_bwd
