"""The op of mLSTM's memory with its reference, and what computes it. Its gradients are linear attention's."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.delta_rule.ops import exactly
from tilebook.kernels.linear_attention.ops import linear_attention_bwd, supports
from tilebook.kernels.linear_attention.space import SPACE
from tilebook.kernels.mlstm.launch import mlstm_fwd as launch
from tilebook.kernels.mlstm.problem import Problem
from tilebook.kernels.mlstm.pytorch import chunked


@op.define("mlstm_fwd", Problem)
def mlstm_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, floor: torch.Tensor,
    state: torch.Tensor | None, scale: float, eps: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q and k (B, H, S, D), v (B, H, S, V), g and floor (B, H, S), state (B, H, D, V + 1) → o in the shape of v, the
    last state, and the sums of weights (B, H, S), before their absolute values."""
    return exactly(chunked, (q, k, v, g, floor, state), (scale, eps))


mlstm_fwd.implementation("triton", space=SPACE, supports=supports)(launch)
mlstm_fwd.implementation("torch")(chunked)

mlstm_fwd.backward = linear_attention_bwd
