"""Norms over the last axis: RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba, Kiros & Hinton, 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook.call import Entry, constant, left_whole, recorded, way
from tilebook.kernels.norms.check import check, check_alike
from tilebook.kernels.norms.entry import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    LAYER_NORM,
    RMS_NORM,
    addressed,
    registered,
    turned,
)
from tilebook.kernels.norms.pytorch import HOST_BOUND
from tilebook.left import ORDINARY, again, gated, recall
from tilebook.traced import ahead, described

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]

Vector = torch.Tensor | None


@gated("rms_norm")
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """y = x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019, eq. 4), in fp32 inside.

    Args:
        x: (…, N), floating point; any strides, fastest where the last axis is contiguous.
        weight: (N,), in the dtype of x or another; None for ones.
        eps: added to the mean square, so that a zero vector stays one.

    Returns:
        (…, N) in the dtype of x.

    Kernels of ours run for fp16, bf16 and fp32 with N ≤ 65536 on a GPU where a verdict has them ahead; under
    `torch.compile`, ahead of its own code. All else runs as plain PyTorch. Differentiable in x and weight; both
    gradients of our kernels repeat bit for bit.

    Raises:
        ValueError: a weight that does not fit x in shape or device, or tensors that are not floating point.
    """
    given = x, weight
    if has_torch_function(given):
        found: torch.Tensor = handle_torch_function(rms_norm, given, *given, eps)
        return found
    return _norm(RMS_NORM, x, (weight,), eps)  # type: ignore[no-any-return]


@gated("layer_norm")
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """y = (x − mean(x)) / √(variance(x) + eps) · weight + bias over the last axis (Ba, Kiros & Hinton, 2016, eq. 4).

    Args:
        x: (…, N), floating point; any strides, fastest where the last axis is contiguous.
        weight: (N,), in the dtype of x or another; ones if None.
        bias: (N,), likewise; zeros if None.
        eps: added to the variance, so that a constant vector becomes 0.

    Returns:
        (…, N) in the dtype of x, computed in fp32.

    Kernels of ours run for fp16, bf16 and fp32 with N ≤ 65536 on a GPU where a verdict has them ahead; under
    `torch.compile`, ahead of its own code. All else, as a bias without a weight, runs as plain PyTorch. Differentiable
    in all three; the gradients of our kernels repeat bit for bit.

    Raises:
        ValueError: a weight or bias that does not fit x in shape or device, or tensors that are not floating point.
    """
    given = x, weight, bias
    if has_torch_function(given):
        found: torch.Tensor = handle_torch_function(layer_norm, given, *given, eps)
        return found
    return _norm(LAYER_NORM, x, (weight, bias), eps)  # type: ignore[no-any-return]


@gated("add_rms_norm")
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + residual and y = `rms_norm(h, weight, eps)`, in one pass: (y, h), h being the residual of what follows.

    Args:
        x: (…, N), floating point: what a layer gives.
        residual: like x: what it is added to.
        weight: (N,), in the dtype of x or another; None for ones.
        eps: added to the mean square, so that a zero vector stays one.

    Returns:
        y and h (…, N) in the dtype of x. h is rounded before it is normalised, as by PyTorch's two calls.

    Kernels of ours run as for `rms_norm`, where x and residual have one dtype; all else runs as two calls of PyTorch's.
    Differentiable in all tensors. What is kept for the backward pass is h, and neither x nor residual.

    Raises:
        ValueError: a residual or weight that does not fit x in shape or device, or tensors that are not floating point.
    """
    given = x, residual, weight
    if has_torch_function(given):
        found: tuple[torch.Tensor, torch.Tensor] = handle_torch_function(add_rms_norm, given, *given, eps)
        return found
    return _norm(ADD_RMS_NORM, x, (weight,), eps, residual)  # type: ignore[no-any-return]


@gated("add_layer_norm")
def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + residual and y = `layer_norm(h, weight, bias, eps)`, in one pass: (y, h), h being the residual of what
    follows, or nobody's where norms come behind sums.

    Args:
        x: (…, N), floating point: what a layer gives.
        residual: like x: what it is added to.
        weight: (N,), in the dtype of x or another; ones if None.
        bias: (N,), likewise; zeros if None.
        eps: added to the variance, so that a constant vector becomes 0.

    Returns:
        y and h (…, N) in the dtype of x. h is rounded before it is normalised, as by PyTorch's two calls.

    Kernels of ours run as for `layer_norm`, where x and residual have one dtype; all else runs as two calls of
    PyTorch's. Differentiable in all tensors. What is kept for the backward pass is h, and neither x nor residual.

    Raises:
        ValueError: a residual, weight or bias that does not fit x in shape or device, or tensors that are not floating
            point.
    """
    given = x, residual, weight, bias
    if has_torch_function(given):
        found: tuple[torch.Tensor, torch.Tensor] = handle_torch_function(add_layer_norm, given, *given, eps)
        return found
    return _norm(ADD_LAYER_NORM, x, (weight, bias), eps, residual)  # type: ignore[no-any-return]


def pytorchs(name: str, x: torch.Tensor, *vectors: Vector) -> bool:
    """Is an eager call of the norm with these tensors like one that is known to be PyTorch's own to serve?"""
    given = [x, *[each for each in vectors if each is not None]]
    return type(x) in ORDINARY and again(_near(name, x, given, vectors), *given)


def _near(name: str, x: torch.Tensor, given: list[torch.Tensor], vectors: tuple[Vector, ...]) -> tuple[Any, ...]:
    return name, x.shape, len(given), vectors[0] is None


def _norm(
    entry: Entry, x: torch.Tensor, vectors: tuple[Vector, ...], eps: float, *more: torch.Tensor
) -> Any:  # fmt: skip
    """What all norms are: PyTorch's own functions, or the kernels, whichever serves this call. more: is added to x."""
    if type(eps) is not float:
        constant("eps", eps)
        eps = float(eps)
    own, whole = None, (x, *more, *vectors)
    if type(x) in ORDINARY:
        given = [x, *more, *[each for each in vectors if each is not None]]
        near = _near(entry.name, x, given, vectors)
        if again(near, *given):
            return entry.plain(whole, (eps,))
        if all(type(each) in ORDINARY for each in given):
            own = near, x.stride(), x.dtype, *[(each.shape, each.dtype) for each in given[1:]]
            if recall(own, near, *given):
                return entry.plain(whole, (eps,))
    route = way(x, *more, optional=vectors)
    names, mixed = entry.tensors[1 + len(more) :], False
    for each in more:
        check_alike(x, each)
        mixed |= each.dtype != x.dtype
        # Of two leaves, seen as rows, one gradient would be both's, and what is added to one be added to the other.
        mixed |= x.ndim != 2 and x.is_leaf and each.is_leaf and x.requires_grad and each.requires_grad
    alone = vectors[0] is None and any(each is not None for each in vectors)
    if route == "pytorch" or torch.compiler.is_compiling() or not x.ndim or alone or mixed:
        check(names, x, vectors)
        if route == "op" and not alone and not mixed and _ahead(entry, whole, eps):
            rows = addressed((*(each.reshape(-1, x.shape[-1]) for each in (x, *more)), *vectors))
            return _shaped(entry, entry.through(rows, (eps,)), x)
        return entry.plain(whole, (eps,))
    forward = registered(entry.name)[0]
    turn = None
    if route == "direct" and x.stride(-1) != 1 and not more:
        check(names, x, vectors)
        turn = turned(forward, (x, *vectors, eps))
    flat: tuple[torch.Tensor, ...] = turn[:1] if turn else (x, *more)
    if not turn and x.ndim != 2 and x.numel():
        flat = tuple(each.reshape(-1, x.shape[-1]) for each in flat)
    tensors = addressed((*flat, *vectors))

    def checked() -> bool:
        check(names, x, vectors)
        return not x.numel() or any(each is not None and each.dtype == torch.float64 for each in vectors)

    alike = all(each is None or each.dtype == x.dtype for each in vectors)
    outputs = entry.serve(
        route, forward, tensors, (eps,), checked, own=own if alike else None, size=x.numel(),
        bounds=(HOST_BOUND, HOST_BOUND), whole=left_whole,
    )  # fmt: skip
    return entry.plain(whole, (eps,)) if outputs is None else _shaped(entry, outputs, x)


def _shaped(entry: Entry, outputs: tuple[torch.Tensor, ...], x: torch.Tensor) -> Any:
    """The results, as x is shaped."""
    y = outputs[0].view(x.shape)
    return (y, outputs[1].view(x.shape)) if entry.addends else y


def _ahead(entry: Entry, tensors: tuple[Vector, ...], eps: float) -> bool:
    """Are our kernels ahead of what its compiler makes of a program that is being traced?"""
    call, x = described(*tensors, eps), tensors[0]
    assert x is not None
    names = (f"{entry.name}_fwd", f"{entry.name}_bwd") if recorded(tensors) else (f"{entry.name}_fwd",)
    return call is not None and x.numel() > 0 and ahead("norms", names, call, x.device)
