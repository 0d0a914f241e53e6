"""The ops of linear attention with decays by channel with their references, and what computes them."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.channel_decay import fla, launch
from tilebook.kernels.channel_decay.problem import BackwardProblem, ChannelDecay, Problem
from tilebook.kernels.channel_decay.pytorch import chunked, gradients
from tilebook.kernels.channel_decay.space import SPACE, SPACE_BWD
from tilebook.kernels.delta_rule.ops import exactly


@op.define("channel_decay_fwd", Problem)
def channel_decay_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, ...]:
    """q, k and g (B, H, S, D), v (B, H, S, V), state (B, H, D, V) → o in the shape of v and the last state."""
    return exactly(chunked, (q, k, v, g, state), (scale,))


@op.define("channel_decay_bwd", BackwardProblem, direction="bwd")
def channel_decay_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    state: torch.Tensor | None, scale: float, decayed: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """→ dq, dk, dv, and dg and the gradient of `state`, nothing where they are not there or not wanted."""
    return exactly(gradients, (do, dstate, q, k, v, g, state), (scale, decayed))


def supports(problem: ChannelDecay) -> bool:
    """Do our kernels serve it?"""
    widths = problem.head_dim, problem.value_dim
    return problem.dtype in ("bf16", "fp16", "fp32") and all(1 <= width <= 256 for width in widths)


channel_decay_fwd.implementation("triton", space=SPACE, supports=supports)(launch.channel_decay_fwd)
channel_decay_bwd.implementation("triton", space=SPACE_BWD, supports=supports)(launch.channel_decay_bwd)
channel_decay_fwd.implementation("torch")(chunked)
channel_decay_bwd.implementation("torch")(gradients)
channel_decay_fwd.implementation("fla", external=fla.PACKAGE, available=fla.available, supports=fla.supports)(
    fla.forward
)
channel_decay_bwd.implementation("fla", external=fla.PACKAGE, available=fla.available, supports=fla.supports)(
    fla.backward
)

channel_decay_fwd.backward = channel_decay_bwd
