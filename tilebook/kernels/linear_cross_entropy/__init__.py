"""Cross entropy of a linear layer's outputs, of which a chunk of rows exists at a time: a language model's loss.

Loss and gradients are made in the forward pass, chunk by chunk, and the gradient of the loss multiplies them later
(Hsu et al., 2024, Liger-Kernel, §3.2; `torch.nn.functional.linear_cross_entropy`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import constant, recorded, way
from tilebook.casting import autocast_dtype, autocast_on
from tilebook.kernels.cross_entropy.problem import IGNORED
from tilebook.kernels.cross_entropy.pytorch import HOST_BOUND as LOSS_BOUND
from tilebook.kernels.linear_cross_entropy.check import check
from tilebook.kernels.linear_cross_entropy.entry import LINEAR_CROSS_ENTROPY
from tilebook.kernels.linear_cross_entropy.pytorch import composed
from tilebook.left import ORDINARY, Left, again, gated, keep, recall

__all__ = ["linear_cross_entropy"]

HOST_BOUND = 1 << 35
"""Logits times features up to which the host takes as long for the chunks as a GPU does."""

_LOSS = 350
"""Features whose products take as long as the rest of the loss."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@gated("linear_cross_entropy")
def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """`tilebook.cross_entropy` of the logits input · linear_weightᵀ + linear_bias, without ever having all of them.

    The arguments are those of `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13), and more axes, softcap and
    z_loss besides.

    Args:
        input: the model's last hidden state: (…, H), floating point.
        linear_weight: (V, H), of the head; or (V, d1, …, H) with input (N, H).
        target: (…) class indices in int64; or probabilities, (…, V) in floating point. With (V, d1, …, H) it is
            (N, d1, …) or (N, V, d1, …).
        linear_bias: (V,) or (V, d1, …), or None.
        weight: (V,), of the classes, or None.
        reduction: "mean" over the rows that count (weighted by their classes' weights), "sum" or "none".
        ignore_index: the target of rows that do not count, -100 for None. Not with probabilities.
        label_smoothing: ε, between 0 and 1.
        options: PyTorch's own for its chunks, whose function then runs; None for ours. Not with softcap or z_loss.
        softcap: c > 0 for c · tanh(x / c) in the place of the logits x (Gemma 2, 2024, §2); 0 for none.
        z_loss: z of z · lse² (Chowdhery et al., 2022, §5); 0 for none. Only with class indices and without weight.

    Returns:
        A number, or with "none" the shape of a target of class indices; in the dtype of the logits, in fp32 under
        autocast.

    Chunks run on a GPU for the mean or sum over class indices without weight, where logits are large enough, in bf16,
    fp16 and fp32; under autocast weights are cast once and their gradients summed in fp32. All else runs the linear
    layer and `tilebook.cross_entropy`, as do `torch.func.grad` and tensors of other classes. Gradients are made with
    the loss: a call under `torch.enable_grad` whose loss is not differentiated computes them in vain.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, an unknown reduction, an ignore_index with
            probabilities, or what `tilebook.cross_entropy` refuses of the rest.
    """
    given = tuple(x for x in (input, linear_weight, target, linear_bias, weight) if x is not None)
    more: dict[str, Any] = {"linear_bias": linear_bias, "weight": weight, "reduction": reduction}
    more |= {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "options": options}
    if has_torch_function(given):
        more |= {"softcap": softcap, "z_loss": z_loss}
        found: torch.Tensor = handle_torch_function(linear_cross_entropy, given, input, linear_weight, target, **more)
        return found
    if options is not None:
        if softcap or z_loss:
            raise ValueError("options are of PyTorch's function, which has no softcap and no z_loss")
        return torch.nn.functional.linear_cross_entropy(input, linear_weight, target, **more)  # type: ignore
    own, ignored = None, IGNORED if ignore_index is None else ignore_index
    if weight is None and not (softcap or z_loss) and reduction in ("mean", "sum") and _usual(given, label_smoothing):
        told = reduction, autocast_dtype(input), label_smoothing > 0
        near = "head", input.shape, linear_weight.shape, target.shape, told
        own = near, *[(x.stride(), x.dtype) for x in given]
        if again(near, *given) or recall(own, near, *given):
            rest = linear_bias, None, ignored, reduction, label_smoothing, 0.0, 0.0
            return composed(input, linear_weight, target, *rest)
    numbers = label_smoothing, softcap, z_loss
    for name, number in zip(("label_smoothing", "softcap", "z_loss"), numbers, strict=True):
        constant(name, number)
    route = way(input, linear_weight, target, optional=(linear_bias, weight))
    check(input, linear_weight, target, linear_bias)
    if target.is_floating_point() and ignore_index is not None:
        raise ValueError("ignore_index is of class indices, not of probabilities")
    tensors = input, linear_weight, target, linear_bias
    if route != "pytorch" and reduction in ("mean", "sum") and weight is None and takes(*tensors, ignored, *numbers):
        loss = chunked(route, tensors, ignored, reduction, *numbers)
        return loss if autocast_on(input) else loss.to(input.dtype)
    loss = composed(*tensors, weight, ignored, reduction, *numbers)
    settled = own is not None and route == "direct" and not (dispatch.forced() or dispatch.here.prober)
    if settled and _is_small(*tensors[:3]):
        keep(own, Left(forward=True, training=True, bounded=True))
    return loss


def _usual(given: tuple[Any, ...], label_smoothing: Any) -> bool:
    return all(type(x) in ORDINARY for x in given) and type(label_smoothing) is float


def _is_small(input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor) -> bool:
    """Is it a call with class indices whose loss is PyTorch's whoever is ahead, since the host bounds it?"""
    indices = target.dtype == torch.int64 and target.shape == input.shape[:-1]
    return indices and linear_weight.ndim == 2 and target.numel() * linear_weight.shape[0] <= LOSS_BOUND


def takes(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, linear_bias: torch.Tensor | None,
    ignored: Any, label_smoothing: float, softcap: float, z_loss: float,
) -> bool:  # fmt: skip
    """Is a call that has passed the checks one for chunks, and large enough?"""
    parts = [x for x in (input, linear_weight, linear_bias) if x is not None]
    dtype = autocast_dtype(input)
    usual = all(type(x) in ORDINARY for x in (*parts, target)) and type(ignored) is int
    alike = all(x.dtype in _DTYPES and (dtype is not None or x.dtype == input.dtype) for x in parts)
    if not (usual and alike and dtype in (None, *_DTYPES)):
        return False
    if linear_weight.ndim != 2 or target.dtype != torch.int64 or target.shape != input.shape[:-1]:
        return False
    if not (0 <= label_smoothing <= 1 and 0 <= softcap < math.inf):
        return False
    return dispatch.forced() or bool(target.numel() * linear_weight.shape[0] * (input.shape[-1] + _LOSS) > HOST_BOUND)


def chunked(
    route: str, tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], ignored: int,
    reduction: str, label_smoothing: float, softcap: float, z_loss: float,
) -> torch.Tensor:  # fmt: skip
    """The loss in fp32 of a call that `takes` takes."""
    input, linear_weight, target, linear_bias = tensors
    rows = input.reshape(-1, input.shape[-1]), linear_weight, target.reshape(-1), linear_bias
    wants = [recorded((x,)) for x in (input, linear_weight, linear_bias)]
    dtype = autocast_dtype(input) or input.dtype
    packed = float(label_smoothing), ignored, float(softcap), float(z_loss), reduction == "mean", dtype, *wants
    if route == "op":
        return LINEAR_CROSS_ENTROPY.through(rows, packed)[0]
    return LINEAR_CROSS_ENTROPY.direct(None, rows, packed)[0]


def wide_loss(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, linear_bias: torch.Tensor | None,
    ignored: int, reduction: str, softcap: float,
) -> torch.Tensor:  # fmt: skip
    """The mean or sum in fp32, as of logits that are cast to it."""
    tensors, numbers = (input, linear_weight, target, linear_bias), (0.0, softcap, 0.0)
    route = way(input, linear_weight, target, optional=(linear_bias,))
    if route != "pytorch" and takes(*tensors, ignored, *numbers):
        return chunked(route, tensors, ignored, reduction, *numbers)
    return composed(*tensors, None, ignored, reduction, *numbers, wide=True)
