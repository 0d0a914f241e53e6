"""The loss of a model's head in PyTorch's own functions and our cross entropy, with all logits at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook.kernels.cross_entropy import cross_entropy
from tilebook.kernels.cross_entropy import pytorch as plain


def composed(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, linear_bias: torch.Tensor | None,
    weight: torch.Tensor | None, ignore_index: int, reduction: str, *options: float, wide: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`tilebook.linear_cross_entropy` of any arguments that it takes. options: label_smoothing, softcap, z_loss."""
    classes, *places = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits, given = F.linear(input, linear_weight.flatten(0, -2), bias), target
    if places:
        logits = logits.reshape(len(input), classes, *places)
    elif input.ndim > 2:
        logits = logits.flatten(0, -2)
        target = target.flatten(0, input.ndim - 2)
    smoothing, softcap, z_loss = options
    loss = cross_entropy(
        logits.float() if wide else logits, target, weight, ignore_index, reduction, smoothing,
        softcap=softcap, z_loss=z_loss,
    )  # fmt: skip
    return (
        loss.reshape(given.shape[: input.ndim - 1]) if reduction == "none" and input.ndim > 2 and not places else loss
    )


def summed(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> torch.Tensor:
    """The loss in fp32, for an entry's tensors and options: differentiable as often as PyTorch's functions are."""
    smoothing, ignore_index, softcap, z_loss, mean, dtype, *_ = options
    input, linear_weight, _, bias = tensors
    with torch.autocast(input.device.type, enabled=False):
        logits = F.linear(input.to(dtype), linear_weight.to(dtype), None if bias is None else bias.to(dtype)).float()
        reduction = "mean" if mean else "sum"
        return plain.cross_entropy(logits, tensors[2], None, ignore_index, reduction, smoothing, softcap, z_loss)
