"""MLP block: y = act(x W1ᵀ + b1) W2ᵀ + b2, with GELU (Hendrycks & Gimpel, 2016) or ReLU between two linear layers.

Two kernels forward, one backward; the rest of the backward is plain products, which are cuBLAS's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook import dispatch
from tilebook.autograd import once
from tilebook.kernels.mlp.form import ACTIVATIONS
from tilebook.kernels.mlp.ops import mlp_act_bwd, mlp_down_fwd, mlp_grads_bwd, mlp_up_fwd
from tilebook.kernels.mlp.pytorch import act, each_alone

__all__ = ["mlp"]


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor,
        w2: torch.Tensor,
        b2: torch.Tensor,
        activation: str,
        choice: dispatch.Choice,
    ) -> torch.Tensor:
        save = any(ctx.needs_input_grad[:4])
        h, z = choice(x, w1, b1, activation, save) if save else dispatch.run(mlp_up_fwd, x, w1, b1, activation, False)
        if save:
            ctx.save_for_backward(x, z, w1, w2)
            ctx.call = activation, choice
        return choice.follow(mlp_down_fwd, (w2, b2), h, w2, b2)[0]

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[:5]
        if not any(needed[:4]):
            return None, None, None, None, dy.sum(0), None, None
        x, z, w1, w2 = ctx.saved_tensors
        activation, choice = ctx.call
        if not any(needed[:3]):
            dw2 = torch.mm(dy.t(), act(z, activation)) if needed[3] else None
            return None, None, None, dw2, dy.sum(0) if needed[4] else None, None, None
        dz, h = choice.follow(mlp_act_bwd, (dy, w2), dy, w2, z, activation)
        if all(needed):
            return *choice.follow(mlp_grads_bwd, (dy,), dy, h, dz, x, w1), None, None
        dx, dw1, db1, dw2, db2 = (
            make() if need else None for need, make in zip(needed, each_alone(dy, h, dz, x, w1), strict=True)
        )
        return dx, dw1, db1, dw2, db2, None, None


def mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
) -> torch.Tensor:
    """y = act(x W1ᵀ + b1) W2ᵀ + b2, the two-layer block of a transformer (Vaswani et al., 2017, §3.3).

    The activation is computed with the first product, and its derivative with the product that needs it. Between
    forward and backward only z = x W1ᵀ + b1 is kept beside the inputs: act(z) is computed again, not stored.

    Args:
        x: (…, H), floating point; any strides, fastest where the last axis is contiguous.
        w1: (I, H), as `torch.nn.Linear(H, I).weight` is.
        b1: (I,), or None.
        w2: (H, I), as `torch.nn.Linear(I, H).weight` is.
        b2: (H,), or None.
        activation: "gelu" (x Φ(x), Hendrycks & Gimpel, 2016), "gelu_tanh" (their approximation) or "relu".

    Returns:
        (…, H) in the dtype of x; under autocast in autocast's dtype, as `torch.nn.functional.linear` does.

    Kernels of ours run for fp16 and bf16 on a GPU, with fp32 accumulation; all else (other dtypes, the CPU, no bias, an
    empty x) runs as plain PyTorch, with the same result. Differentiable once in every tensor.

    Raises:
        ValueError: ranks, sizes, dtypes or devices that do not fit together, or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if torch.is_autocast_enabled(x.device.type):
        x, w1, w2 = _autocast(x), _autocast(w1), _autocast(w2)
        b1, b2 = (None if bias is None else _autocast(bias) for bias in (b1, b2))
    training = torch.is_grad_enabled()
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.ndim else x
    choice = dispatch.known(mlp_up_fwd, flat, w1, b1, activation, training)
    if choice is None or choice.source == "fallback" or not _fits(w2, b2, w1):
        _check(x, w1, b1, w2, b2)
        usual = b1 is not None and b2 is not None and x.numel() and w1.numel()
        choice = dispatch.find(mlp_up_fwd, flat, w1, b1, activation, training) if usual else None
        if choice is None:
            return F.linear(act(F.linear(x, w1, b1), activation), w2, b2)
    if training:
        y: torch.Tensor = _MLP.apply(flat, w1, b1, w2, b2, activation, choice)
    else:
        (y,) = dispatch.run(mlp_down_fwd, choice(flat, w1, b1, activation, False)[0], w2, b2)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def _check(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None
) -> None:
    if x.ndim < 1 or w1.ndim != 2 or w2.ndim != 2:
        raise ValueError(
            f"expected x (…, H), w1 (I, H) and w2 (H, I), not shapes {_shape(x)}, {_shape(w1)} and {_shape(w2)}"
        )
    inner, width = w1.shape
    if x.shape[-1] != width or w2.shape != (width, inner):
        raise ValueError(
            f"w1 {_shape(w1)} asks for x (…, {width}) and w2 ({width}, {inner}), not {_shape(x)} and {_shape(w2)}"
        )
    for name, bias, size in (("b1", b1, inner), ("b2", b2, width)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), not {_shape(bias)}")
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}")


def _fits(w2: torch.Tensor, b2: torch.Tensor | None, w1: torch.Tensor) -> bool:
    """Does the second layer go with the first, which has been seen before?"""
    inner, width = w1.shape
    return (
        b2 is not None
        and w2.shape == (width, inner)
        and b2.shape == (width,)
        and w2.dtype == b2.dtype == w1.dtype
        and w2.device == b2.device == w1.device
    )


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What autocast makes of an operand of a product: all floating point but fp64 takes its dtype."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
