"""What calls of gated linear units must satisfy."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.glu.form import ACTIVATIONS


def check(gate: torch.Tensor, up: torch.Tensor | None, activation: Any) -> None:
    """Raises ValueError for what does not go together in a call of `glu`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if gate.ndim < 1 or not gate.is_floating_point():
        raise ValueError(f"gate must be floating point (…, F), not {gate.dtype} {tuple(gate.shape)}")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate must be (…, 2F) where it holds up too, not {tuple(gate.shape)}")
        return
    if up.shape != gate.shape:
        raise ValueError(f"expected gate and up in one shape, not {tuple(gate.shape)} and {tuple(up.shape)}")
    if up.device != gate.device or not up.is_floating_point():
        raise ValueError(f"up must be floating point on {gate.device}, not {up.dtype} on {up.device}")


def check_block(
    x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor | None, down_weight: torch.Tensor,
    gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None, down_bias: torch.Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError for what does not go together in a call of `swiglu` or `geglu`."""
    if x.ndim < 1 or gate_weight.ndim != 2 or down_weight.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"expected floating point x (…, H) and weights (F, H) and (H, F), not {x.dtype} {tuple(x.shape)}, "
            f"{tuple(gate_weight.shape)} and {tuple(down_weight.shape)}"
        )
    (out, inner), width = down_weight.shape, x.shape[-1]
    packed = 1 if up_weight is not None else 2
    shapes = {
        "gate_weight": (gate_weight, (packed * inner, width)),
        "up_weight": (up_weight, (inner, width)),
        "down_weight": (down_weight, (out, inner)),
        "gate_bias": (gate_bias, (packed * inner,)),
        "up_bias": (up_bias, (inner,)),
        "down_bias": (down_bias, (out,)),
    }
    for name, (each, shape) in shapes.items():
        if each is None:
            continue
        if each.shape != shape:
            raise ValueError(f"x {tuple(x.shape)} asks for {name} {shape}, not {tuple(each.shape)}")
        if each.dtype != x.dtype or each.device != x.device:
            raise ValueError(f"{name} is {each.dtype} on {each.device}, but x is {x.dtype} on {x.device}")
    if up_weight is None and up_bias is not None:
        raise ValueError("up_bias must be None, or part of gate_bias, where gate_weight holds up_weight too")
