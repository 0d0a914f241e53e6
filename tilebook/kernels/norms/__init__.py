"""Norms over the last axis. RMSNorm: y = x · rstd · weight, rstd = 1 / √(mean(x²) + eps), Zhang & Sennrich 2019."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

from tilebook import dispatch
from tilebook.call import recorded, rows, vector, way
from tilebook.kernels.norms.entry import NORM, registered
from tilebook.kernels.norms.pytorch import plain

__all__ = ["rms_norm"]

_HOST_BOUND = 1 << 22
"""Elements up to which the GPU is done with an eager call before the host has made the next one."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """y = x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, 2019, eq. 4), in fp32 inside.

    Args:
        x: (…, N), floating point; any strides, fastest where the last axis is contiguous.
        weight: (N,), in the dtype of x or another; None for ones.
        eps: added to the mean square, so that a zero vector stays one.

    Returns:
        (…, N) in the dtype of x.

    Kernels of ours run for fp16, bf16 and fp32 with N ≤ 65536 on a GPU where a verdict has them ahead; all else, and
    `torch.compile`, runs as plain PyTorch. Differentiable in x and weight; both gradients of our kernels repeat bit for
    bit.

    Raises:
        ValueError: a weight that does not fit x in shape or device, or tensors that are not floating point.
    """
    if has_torch_function((x, weight)):
        found: torch.Tensor = handle_torch_function(rms_norm, (x, weight), x, weight, eps)
        return found
    route = way(x, optional=(weight,))
    if route == "pytorch" or weight is None or torch.compiler.is_compiling() or not x.ndim:
        _check(x, weight)
        return plain((x, weight), (eps,))
    if route == "direct" and x.numel() <= _HOST_BOUND and x.dtype == weight.dtype and not _graph():
        if x.shape[-1:] != weight.shape or not weight.is_cuda:
            _check(x, weight)
        return torch.rms_norm(x, weight.shape, weight, eps)  # type: ignore[no-any-return]
    flat = rows(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x)
    tensors = flat, vector(weight)
    choice = dispatch.known(registered()[0], (*tensors, eps)) if route == "direct" else None
    if choice is None:
        _check(x, weight)
        if not x.numel() or weight.dtype == torch.float64:
            return plain((x, weight), (eps,))
        if route == "op":
            if NORM.left_to_pytorch(lambda: (registered()[0], registered()[0].problem.of(*tensors, eps)), tensors):
                return plain((x, weight), (eps,))
            return NORM.through(tensors, (eps,))[0].view(x.shape)
        choice = dispatch.lookup(registered()[0], (*tensors, eps))
    if choice.native and (not recorded(tensors) or dispatch.backward_of(choice).native):
        choice.calls += 1
        return plain((x, weight), (eps,))
    return NORM.direct(choice, tensors, (eps,))[0].view(x.shape)


def _graph() -> bool:
    """Is a graph being captured, which is replayed without the host, or an implementation forced?"""
    return dispatch.forced() or torch.cuda.is_current_stream_capturing()


def _check(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    if weight is None:
        if x.ndim < 1 or not x.is_floating_point():
            raise ValueError(f"x must be floating point (…, N), not {x.dtype} {tuple(x.shape)}")
        return
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"expected x (…, N) and weight (N,), not {tuple(x.shape)} and {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, but x on {x.device}")
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"x and weight must be floating point, not {x.dtype} and {weight.dtype}")
