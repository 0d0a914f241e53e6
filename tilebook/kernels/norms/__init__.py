"""Norms over the last axis: RMSNorm (Zhang & Sennrich, 2019) and LayerNorm (Ba, Kiros & Hinton, 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import Entry, constant, left_whole, recorded, way
from tilebook.kernels.norms.check import check
from tilebook.kernels.norms.entry import LAYER_NORM, RMS_NORM, addressed, registered, turned
from tilebook.kernels.norms.pytorch import HOST_BOUND
from tilebook.left import ORDINARY, again, keep, known, recall, unsettled
from tilebook.traced import ahead, described

__all__ = ["layer_norm", "rms_norm"]

Vector = torch.Tensor | None


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
    return _norm(RMS_NORM, x, (weight,), eps)


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
    return _norm(LAYER_NORM, x, (weight, bias), eps)


def pytorchs(name: str, x: torch.Tensor, *vectors: Vector) -> bool:
    """Is an eager call of the norm with these tensors like one that is known to be PyTorch's own to serve?"""
    given = [x, *[each for each in vectors if each is not None]]
    return type(x) in ORDINARY and again(_near(name, x, given, vectors), *given)


def _near(name: str, x: torch.Tensor, given: list[torch.Tensor], vectors: tuple[Vector, ...]) -> tuple[Any, ...]:
    return name, x.shape, len(given), vectors[0] is None


def _norm(entry: Entry, x: torch.Tensor, vectors: tuple[Vector, ...], eps: float) -> torch.Tensor:
    """What all norms are: PyTorch's own function, or the kernels, whichever serves this call."""
    if type(eps) is not float:
        constant("eps", eps)
        eps = float(eps)
    own = None
    if type(x) in ORDINARY:
        given = [x, *[each for each in vectors if each is not None]]
        near = _near(entry.name, x, given, vectors)
        if again(near, *given):
            return entry.plain((x, *vectors), (eps,))
        if all(type(each) in ORDINARY for each in given):
            own = near, x.stride(), x.dtype, *[(each.shape, each.dtype) for each in given[1:]]
            if recall(own, near, *given):
                return entry.plain((x, *vectors), (eps,))
    route = way(x, optional=vectors)
    alone = vectors[0] is None and any(each is not None for each in vectors)
    if route == "pytorch" or torch.compiler.is_compiling() or not x.ndim or alone:
        check(entry.tensors[1:], x, vectors)
        if route == "op" and not alone and _ahead(entry, x, vectors, eps):
            return entry.through(addressed((x.reshape(-1, x.shape[-1]), *vectors)), (eps,))[0].view(x.shape)
        return entry.plain((x, *vectors), (eps,))
    forward = registered(entry.name)[0]
    turn = None
    if route == "direct" and x.stride(-1) != 1:
        check(entry.tensors[1:], x, vectors)
        turn = turned(forward, (x, *vectors, eps))
    flat = turn[0] if turn else x if x.ndim == 2 or not x.numel() else x.reshape(-1, x.shape[-1])
    tensors = addressed((flat, *vectors))
    choice = dispatch.known(forward, (*tensors, eps)) if route == "direct" else None
    if choice is None:
        check(entry.tensors[1:], x, vectors)
        if not x.numel() or any(each is not None and each.dtype == torch.float64 for each in vectors):
            return entry.plain((x, *vectors), (eps,))
        if route == "op":
            if entry.left_to_pytorch(lambda: (forward, forward.problem.of(*tensors, eps)), tensors):
                return entry.plain((x, *vectors), (eps,))
            return entry.through(tensors, (eps,))[0].view(x.shape)
        choice = dispatch.lookup(forward, (*tensors, eps))
    if own is not None and unsettled(own, choice) and all(each is None or each.dtype == x.dtype for each in vectors):
        keep(own, known(choice, x.numel(), (HOST_BOUND, HOST_BOUND)))
    if left_whole(choice, tensors):
        choice.calls += 1
        return entry.plain((x, *vectors), (eps,))
    return entry.direct(choice, tensors, (eps,))[0].view(x.shape)


def _ahead(entry: Entry, x: torch.Tensor, vectors: tuple[Vector, ...], eps: float) -> bool:
    """Are our kernels ahead of what its compiler makes of a program that is being traced?"""
    call = described(x, *vectors, eps)
    names = (f"{entry.name}_fwd", f"{entry.name}_bwd") if recorded((x, *vectors)) else (f"{entry.name}_fwd",)
    return call is not None and x.numel() > 0 and ahead("norms", names, call, x.device)
