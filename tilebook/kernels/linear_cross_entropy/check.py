"""What a call of linear cross entropy must satisfy."""

from __future__ import annotations

import torch


def check(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, linear_bias: torch.Tensor | None
) -> None:
    """Raises ValueError for what does not go together; what a loss alone must satisfy is cross entropy's to check."""
    if input.ndim < 1 or not input.is_floating_point():
        raise ValueError(f"expected floating point input (…, H), not {input.dtype} {tuple(input.shape)}")
    if linear_weight.ndim < 2 or not linear_weight.shape[0]:
        raise ValueError(f"expected linear_weight (V, H) or (V, d1, …, H), not {tuple(linear_weight.shape)}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(f"input has {input.shape[-1]} features, but linear_weight takes {linear_weight.shape[-1]}")
    if linear_weight.ndim > 2 and input.ndim != 2:
        raise ValueError(f"linear_weight {tuple(linear_weight.shape)} wants input (N, H), not {tuple(input.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(f"expected linear_bias {tuple(linear_weight.shape[:-1])}, not {tuple(linear_bias.shape)}")
    for name, each in (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias)):
        if each is not None and each.device != input.device:
            raise ValueError(f"{name} is on {each.device}, but input on {input.device}")


def check_rows(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, linear_bias: torch.Tensor | None
) -> None:
    """The same for rows and class indices, which is what is chunked."""
    check(input, linear_weight, target, linear_bias)
    if input.ndim != 2 or linear_weight.ndim != 2:
        shapes = tuple(input.shape), tuple(linear_weight.shape)
        raise ValueError(f"expected input (M, H) and linear_weight (V, H), not {shapes[0]} and {shapes[1]}")
    if target.dtype != torch.int64 or target.shape != input.shape[:1]:
        raise ValueError(f"expected target (M,) in int64, not {target.dtype} {tuple(target.shape)}")
