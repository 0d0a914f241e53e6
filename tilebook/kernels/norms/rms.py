"""The ops of RMSNorm with their references, and what computes them."""

from __future__ import annotations

from typing import Any

import torch

from tilebook import inductor, op
from tilebook.kernels.norms import launch
from tilebook.kernels.norms.problem import BackwardProblem, Norm, Problem, rstd
from tilebook.kernels.norms.pytorch import HOST_BOUND, rms
from tilebook.kernels.norms.space import SPACE, SPACE_BWD
from tilebook.problem import next_power_of_2

# References, in fp64: fp32 inputs are judged too


def fused(problem: Norm) -> bool:
    """PyTorch has a kernel for every problem."""
    return True


@op.define("rms_norm_fwd", Problem, family="rms_norm", fused=fused)
def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, ...]:
    """x (M, N), or (B, S, N) that lies transposed, weight (N,) or None → y (M, N) in the dtype of x and rstd (M,) in
    fp32.
    """
    return _forward(torch.float64, x, weight, eps)


@op.define("rms_norm_bwd", BackwardProblem, direction="bwd", family="rms_norm", fused=fused)
def rms_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """x̂ = x · rstd, g = dy · weight → dx = rstd · (g − x̂ · mean(g · x̂)), and dweight = Σ dy · x̂ over the rows.

    Without a weight there is dx alone.
    """
    return _backward(torch.float64, dy, x, weight, rstd)


def _forward(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, ...]:
    values = x.to(dtype).reshape(-1, x.shape[-1])
    scale = rstd(values, eps)
    y = values * scale[:, None]
    return (y if weight is None else y * weight.to(dtype)).to(x.dtype), scale.float()


def _backward(
    dtype: torch.dtype, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    scale, upper = rstd.to(dtype)[:, None], dy.to(dtype)
    normal = x.to(dtype).reshape(dy.shape) * scale
    g = upper if weight is None else upper * weight.to(dtype)
    dx = (scale * (g - normal * (g * normal).mean(-1, keepdim=True))).to(x.dtype)
    return (dx,) if weight is None else (dx, (upper * normal).sum(0).to(weight.dtype))


def supports(problem: Norm) -> bool:
    """Do our kernels serve it?"""
    addressed = max(problem.beside, 1) * next_power_of_2(problem.width) < 1 << 31  # from the batch's start, in 32 bits
    return problem.dtype in ("bf16", "fp16", "fp32") and problem.width <= 65536 and addressed


rms_norm_fwd.implementation("triton", space=SPACE, supports=supports)(launch.rms_norm_fwd)
rms_norm_bwd.implementation("triton", space=SPACE_BWD, supports=supports)(launch.rms_norm_bwd)


@rms_norm_fwd.implementation("torch")
def _torch_fwd(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, ...]:
    if _alike(x, weight):
        y, scale = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
        return y.view(-1, x.shape[-1]), scale.view(-1)
    return rms((x, weight), (eps,)).reshape(-1, x.shape[-1]), rstd(x.float(), eps).reshape(-1)


@rms_norm_bwd.implementation("torch")
def _torch_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, rstd: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    if _alike(x, weight):
        mask = [True, weight is not None]
        upper, each_row = dy.view(x.shape), rstd.view(*x.shape[:-1], 1)
        both: Any = torch.ops.aten._fused_rms_norm_backward(upper, x, x.shape[-1:], each_row, weight, mask)
        dx = both[0].reshape(dy.shape)
        return (dx,) if weight is None else (dx, both[1])
    return _backward(torch.float32, dy, x, weight, rstd)


def _alike(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Does PyTorch have a kernel for this, whose statistic can then be had?"""
    return x.is_cuda and (weight is None or x.dtype == weight.dtype)


def outlasts_the_host(problem: Norm) -> bool:
    return problem.rows * problem.width > HOST_BOUND


inductor.register(rms_norm_fwd, _forward, torch.float32, supports=outlasts_the_host)
inductor.register(rms_norm_bwd, _backward, torch.float32, supports=outlasts_the_host)

rms_norm_fwd.backward = rms_norm_bwd
