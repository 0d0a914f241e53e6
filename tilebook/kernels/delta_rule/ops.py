"""The ops of the gated delta rule with their references, and what computes them."""

from __future__ import annotations

from typing import Any

import torch

from tilebook import op
from tilebook.kernels.delta_rule import fla, launch
from tilebook.kernels.delta_rule.problem import BackwardProblem, DeltaRule, Problem
from tilebook.kernels.delta_rule.pytorch import chunked, gradients
from tilebook.kernels.delta_rule.space import SPACE, SPACE_BWD


@op.define("gated_delta_rule_fwd", Problem)
def gated_delta_rule_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor,
    state: torch.Tensor | None, scale: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q and k (B, H, S, D), v (B, H, S, V), g and beta (B, H, S), state (B, H, D, V) → o in the shape of v and the last
    state.
    """
    return exactly(chunked, (q, k, v, g, beta, state), (scale, normalize))


@op.define("gated_delta_rule_bwd", BackwardProblem, direction="bwd")
def gated_delta_rule_bwd(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor | None, scale: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """→ dq, dk, dv, dg, dbeta and the gradient of `state`, nothing where one is not there."""
    return exactly(gradients, (do, dstate, q, k, v, g, beta, state), (scale, normalize))


def exactly(function: Any, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """A function of batches in fp64, one at a time, so that what it makes of them fits into memory."""
    dtypes = [x.dtype for x in tensors if x is not None]
    count, wide = tensors[0].shape[0], [x if x is None else x.double() for x in tensors]
    alone = [function(*(x if x is None else x[b : b + 1] for x in wide), *options) for b in range(count)]
    made = tuple(torch.cat(parts) if parts[0].numel() else parts[0] for parts in zip(*alone, strict=True))
    return tuple(x.to(dtypes[0] if at == 0 else torch.float32) for at, x in enumerate(made))


def supports(problem: DeltaRule) -> bool:
    """Do our kernels serve it?"""
    widths = problem.head_dim, problem.value_dim
    return problem.dtype in ("bf16", "fp16", "fp32") and all(1 <= width <= 256 for width in widths)


gated_delta_rule_fwd.implementation("triton", space=SPACE, supports=supports)(launch.gated_delta_rule_fwd)
gated_delta_rule_bwd.implementation("triton", space=SPACE_BWD, supports=supports)(launch.gated_delta_rule_bwd)
gated_delta_rule_fwd.implementation("torch")(chunked)
gated_delta_rule_bwd.implementation("torch")(gradients)
gated_delta_rule_fwd.implementation("fla", external=fla.PACKAGE, available=fla.available, supports=fla.supports)(
    fla.forward
)
gated_delta_rule_bwd.implementation("fla", external=fla.PACKAGE, available=fla.available, supports=fla.supports)(
    fla.backward
)

gated_delta_rule_fwd.backward = gated_delta_rule_bwd
