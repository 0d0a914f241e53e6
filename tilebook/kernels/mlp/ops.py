"""The four ops of the MLP block with their references, and what computes them; ours beside PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilebook import inductor, op
from tilebook.kernels.mlp import launch
from tilebook.kernels.mlp.problem import BackwardProblem, DownProblem, GradsProblem, Problem, UpProblem
from tilebook.kernels.mlp.pytorch import act, each_alone
from tilebook.kernels.mlp.space import SPACE, SPACE_GRADS

LEAST_FLOPS = 2e10
"""Below this a GPU is done before the host has found a compiled call again."""

MOST_FLOPS = 1e11
"""Beyond this each product fills a GPU by itself, and cuBLAS's are the faster ones."""


def _act_bwd(dh: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        dz: torch.Tensor = torch.ops.aten.threshold_backward(dh, z, 0)
    else:
        dz = torch.ops.aten.gelu_backward(dh, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return dz


def _fused(problem: Problem) -> bool:
    """PyTorch's products serve, unless a verdict has ours ahead."""
    return True


@op.define("mlp_up_fwd", UpProblem, fused=_fused)
def mlp_up_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = act(z), z = x W1ᵀ + b1. Without `save`, z is not kept: an empty tensor stands for it."""
    z = F.linear(x, w1, b1)
    return act(z, activation), z if save else z.new_empty(0)


@op.define("mlp_down_fwd", DownProblem, fused=_fused)
def mlp_down_fwd(h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> tuple[torch.Tensor]:
    """y = h W2ᵀ + b2."""
    return (F.linear(h, w2, b2),)


@op.define("mlp_act_bwd", BackwardProblem, direction="bwd", fused=_fused)
def mlp_act_bwd(
    dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz = (dy W2) ⊙ act′(z), and h = act(z) again, which the forward did not keep."""
    return _act_bwd(dy @ w2, z, activation), act(z, activation)


@op.define("mlp_grads_bwd", GradsProblem, direction="bwd", fused=_fused)
def mlp_grads_bwd(
    dy: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, x: torch.Tensor, w1: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """dx = dz W1, dW1 = dzᵀ x, db1 = Σ dz, dW2 = dyᵀ h, db2 = Σ dy."""
    return tuple(make() for make in each_alone(dy, h, dz, x, w1))


def _supports(problem: Problem) -> bool:
    return problem.dtype in ("bf16", "fp16")


def _supports_grads(problem: Problem) -> bool:
    return _supports(problem) and problem.cost().flops <= MOST_FLOPS


def _outlasts_the_host(problem: Problem) -> bool:
    return problem.dtype != "fp32" and problem.cost().flops > LEAST_FLOPS


mlp_up_fwd.implementation("triton", space=SPACE, supports=_supports)(launch.up)
mlp_down_fwd.implementation("triton", space=SPACE, supports=_supports)(launch.down)
mlp_act_bwd.implementation("triton", space=SPACE, supports=_supports)(launch.act_bwd)
mlp_grads_bwd.implementation("triton", space=SPACE_GRADS, supports=_supports_grads)(launch.grads)

for each in (mlp_up_fwd, mlp_down_fwd, mlp_act_bwd, mlp_grads_bwd):  # PyTorch's, as the references have it
    each.implementation("torch")(each.reference)
    inductor.register(each, each.reference, supports=_outlasts_the_host)

mlp_up_fwd.backward = mlp_act_bwd
