"""The ops of RMSNorm with their references, and what computes them."""

from __future__ import annotations

import torch

from tilebook import op
from tilebook.kernels.norms import launch
from tilebook.kernels.norms.problem import BackwardProblem, Problem, rstd
from tilebook.kernels.norms.pytorch import plain
from tilebook.kernels.norms.space import SPACE, SPACE_BWD

# References, in fp64: fp32 inputs are judged too


def _fused(problem: Problem) -> bool:
    """PyTorch has a kernel for every problem."""
    return True


@op.define("rms_norm_fwd", Problem, family="rms_norm", fused=_fused)
def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, N), weight (N,) → y (M, N) in the dtype of x, rstd (M,) in fp32."""
    scale = rstd(x.double(), eps)
    return (x.double() * scale[:, None] * weight.double()).to(x.dtype), scale.float()


@op.define("rms_norm_bwd", BackwardProblem, direction="bwd", family="rms_norm", fused=_fused)
def rms_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x̂ = x · rstd, g = dy · weight → dx = rstd · (g − x̂ · mean(g · x̂)), dweight = Σ dy · x̂ over the rows."""
    dx, dweight = _backward(dy.double(), x.double(), weight.double(), rstd.double())
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normal, g = x * rstd[:, None], dy * weight
    return rstd[:, None] * (g - normal * (g * normal).mean(-1, keepdim=True)), (dy * normal).sum(0)


# Ours


def _supports(problem: Problem) -> bool:
    return problem.dtype in ("bf16", "fp16", "fp32") and problem.width <= 65536


rms_norm_fwd.implementation("triton", space=SPACE, supports=_supports)(launch.rms_norm_fwd)
rms_norm_bwd.implementation("triton", space=SPACE_BWD, supports=_supports)(launch.rms_norm_bwd)


# PyTorch's


@rms_norm_fwd.implementation("torch")
def _torch_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    if _alike(x, weight):
        y, scale = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        return y, scale[..., 0]
    return plain((x, weight), (eps,)), rstd(x.float(), eps)


@rms_norm_bwd.implementation("torch")
def _torch_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if _alike(x, weight):
        both = torch.ops.aten._fused_rms_norm_backward(dy, x, weight.shape, rstd[..., None], weight, [True, True])
        return both[0], both[1]
    dx, dweight = _backward(dy.float(), x.float(), weight.float(), rstd)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _alike(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Does PyTorch have a kernel for this, whose statistic can then be had?"""
    return x.is_cuda and x.dtype == weight.dtype


rms_norm_fwd.backward = rms_norm_bwd
