"""The op of an addition with its reference, and what computes it."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.addition import launch
from tilebook.kernels.addition.problem import Problem
from tilebook.kernels.addition.space import SPACE


def fused(problem: Problem) -> bool:
    """PyTorch's addition serves, unless a verdict has ours ahead."""
    return True


@op.define("add_fwd", Problem, direction="fwd", fused=fused)
def add_fwd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y, of one shape, in the wider dtype."""
    return (x.to(torch.float64) + y.to(torch.float64)).to(torch.promote_types(x.dtype, y.dtype))


add_fwd.implementation("triton", space=SPACE)(launch.added)


@add_fwd.implementation("torch")
def _torch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What PyTorch's addition runs."""
    return x + y
