"""The ops of cross entropy with their references, and what computes them."""

from __future__ import annotations

from typing import Any

import torch

from tilebook import inductor, op
from tilebook.kernels.cross_entropy import launch
from tilebook.kernels.cross_entropy.problem import BackwardProblem, CrossEntropy, Problem, by_rows, capped
from tilebook.kernels.cross_entropy.pytorch import HOST_BOUND
from tilebook.kernels.cross_entropy.space import SPACE, SPACE_BWD

Outputs = tuple[torch.Tensor, ...]


def fused(problem: CrossEntropy) -> bool:
    """PyTorch has its function for every problem, less so for a soft-cap, which comes before it."""
    return not problem.capped


# References, in fp64: fp32 inputs are judged too. A piece at a time, since a vocabulary's logits take gigabytes.


@op.define("cross_entropy_fwd", Problem, fused=fused)
def cross_entropy_fwd(
    logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, ignore_index: int, softcap: float, z_loss: float
) -> Outputs:
    """x (M, V) after the soft-cap, t (M,) → loss = (1 − ε)(lse − x_t) + ε (lse − mean(x)) + z · lse², and lse.

    Each (M,) in fp32, lse = log Σ eˣ. Both are 0 where t is `ignore_index`; loss is NaN where t is no class.
    """
    options = label_smoothing, ignore_index, softcap, z_loss
    both = by_rows(lambda t, x: torch.stack(_forward(torch.float64, x, t, *options), 1), target, logits)
    return both[:, 0], both[:, 1]


@op.define("cross_entropy_bwd", BackwardProblem, direction="bwd", fused=fused)
def cross_entropy_bwd(
    dloss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, label_smoothing: float,
    ignore_index: int, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """dx = dloss · (e^(x − lse) · (1 + 2 z lse) − (1 − ε) [column is t] − ε / V), times the soft-cap's derivative.

    A row is 0 where t is `ignore_index`, NaN where it is no class.
    """
    options = label_smoothing, ignore_index, softcap, z_loss
    return by_rows(lambda d, t, s, x: _backward(torch.float64, d, x, t, s, *options), dloss, target, lse, logits)


def _forward(
    dtype: torch.dtype, logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, ignore_index: int,
    softcap: float, z_loss: float,
) -> Outputs:  # fmt: skip
    x = capped(logits.to(dtype), softcap)
    keep, valid = target != ignore_index, (target >= 0) & (target < x.shape[1])
    lse = torch.logsumexp(x, 1)
    loss = lse - x.gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - x.mean(1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = torch.where(valid, loss, float("nan"))
    return torch.where(keep, loss, 0.0).float(), torch.where(keep, lse, 0.0).float()


def _backward(
    dtype: torch.dtype, dloss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor,
    label_smoothing: float, ignore_index: int, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    x, sums, classes = capped(logits.to(dtype), softcap), lse.to(dtype)[:, None], logits.shape[1]
    keep, valid = target != ignore_index, (target >= 0) & (target < classes)
    own = torch.arange(classes, device=x.device) == target[:, None]
    dx = torch.exp(x - sums)
    if z_loss:
        dx = dx * (1 + 2 * z_loss * sums)
    dx = dx - torch.where(own, 1 - label_smoothing + label_smoothing / classes, label_smoothing / classes)
    dx = dx * torch.where(valid, dloss.to(dtype), float("nan"))[:, None]
    if softcap:
        dx = dx * (1 - (x / softcap).square())
    return torch.where(keep[:, None], dx, 0.0).to(logits.dtype)


def supports(problem: CrossEntropy) -> bool:
    """Do our kernels serve it?"""
    return problem.dtype in ("bf16", "fp16", "fp32")


cross_entropy_fwd.implementation("triton", space=SPACE, supports=supports)(launch.forward)
cross_entropy_bwd.implementation("triton", space=SPACE_BWD, supports=supports)(launch.backward)


@cross_entropy_fwd.implementation("torch")
def _torch_fwd(
    logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, ignore_index: int, softcap: float, z_loss: float
) -> Outputs:
    """The kernels of `torch.nn.functional.cross_entropy`, one after the other; lse from the log-probabilities it makes.

    A target that is no class is what they refuse.
    """
    x = capped(logits, softcap)
    found: Any = torch.ops.aten._log_softmax(x, 1, False)
    loss = torch.ops.aten.nll_loss_forward(found, target, None, 0, ignore_index)[0].float()
    keep = target != ignore_index
    column = torch.where(keep, target, 0)[:, None]
    lse = torch.where(keep, (x.gather(1, column).float() - found.gather(1, column).float())[:, 0], 0.0)
    if label_smoothing:
        flat = torch.where(keep, -found.sum(1).float(), 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing / x.shape[1] * flat
    return loss + z_loss * lse.square() if z_loss else loss, lse


@cross_entropy_bwd.implementation("torch")
def _torch_bwd(
    dloss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, label_smoothing: float,
    ignore_index: int, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """PyTorch's backward pass reads log-probabilities that its forward pass has kept, which are not among the inputs.

    It fills a matrix with zeros, writes into it the gradient of the negative log-likelihood, reads both and writes
    dlogits. This one moves as many bytes: softmax reads logits and writes, then dloss is multiplied in place.
    """
    x = capped(logits, softcap)
    keep = target != ignore_index
    dx: Any = torch.ops.aten._softmax(x, 1, False)
    if z_loss:
        dx.mul_((1 + 2 * z_loss * lse).to(dx.dtype)[:, None])
    if label_smoothing:
        dx.sub_(label_smoothing / x.shape[1])
    ones = torch.full_like(dx[:, :1], label_smoothing - 1.0)
    dx.scatter_add_(1, torch.where(keep, target, 0)[:, None], ones)
    dx.mul_(torch.where(keep, dloss, 0.0).to(dx.dtype)[:, None])
    if softcap:
        dx.mul_(1 - (x / softcap).square())
    return dx  # type: ignore[no-any-return]


def outlasts_the_host(problem: CrossEntropy) -> bool:
    return problem.rows * problem.classes > HOST_BOUND


inductor.register(cross_entropy_fwd, _forward, torch.float32, supports=outlasts_the_host)
inductor.register(cross_entropy_bwd, _backward, torch.float32, supports=outlasts_the_host)

cross_entropy_fwd.backward = cross_entropy_bwd
