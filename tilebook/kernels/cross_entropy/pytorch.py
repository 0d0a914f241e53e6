"""Cross entropy in PyTorch's own functions, differentiable by its autograd: what runs where no kernel serves."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import _reduction

from tilebook.kernels.cross_entropy.problem import capped

HOST_BOUND = 1 << 22
"""Logits up to which the GPU is done with an eager call before the host has made the next one."""

_cross_entropy: Any = torch._C._nn.cross_entropy_loss
"""What `torch.nn.functional.cross_entropy` calls, in whose place ours may be."""


def cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, reduction: str,
    label_smoothing: float, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """`tilebook.cross_entropy` of any arguments that it takes."""
    how = _reduction.get_enum(reduction)
    if not softcap and not z_loss:
        return _cross_entropy(input, target, weight, how, ignore_index, label_smoothing)  # type: ignore[no-any-return]
    if softcap:
        input = capped(input, softcap)
    loss: torch.Tensor = _cross_entropy(input, target, weight, how, ignore_index, label_smoothing)
    if not z_loss:
        return loss
    classes = min(input.ndim - 1, 1)
    wide = input if input.dtype == torch.float64 else input.float()
    counted = target != ignore_index
    more = z_loss * torch.where(counted, torch.logsumexp(wide, classes).square(), 0.0)
    if reduction == "mean":
        more = more.sum() / counted.sum()
    elif reduction == "sum":
        more = more.sum()
    return (loss + more).to(loss.dtype)


def each(tensors: tuple[Any, ...], options: tuple[float, int, float, float]) -> torch.Tensor:
    """The loss of every row in fp32, for an entry's tensors (logits, target) and its options."""
    (logits, target), (label_smoothing, ignore_index, softcap, z_loss) = tensors, options
    return cross_entropy(logits.float(), target, None, ignore_index, "none", label_smoothing, softcap, z_loss)
