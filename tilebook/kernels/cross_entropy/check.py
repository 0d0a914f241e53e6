"""What a call of cross entropy must satisfy."""

from __future__ import annotations

import math

import torch

REDUCTIONS = ("mean", "sum", "none")


def check_rows(logits: torch.Tensor, target: torch.Tensor) -> None:
    """Raises ValueError for what is not a row of logits for each target."""
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(f"expected floating point logits (M, V), not {logits.dtype} {tuple(logits.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, not {target.dtype}")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"expected target (M,) of logits (M, V), not {tuple(target.shape)} of {tuple(logits.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, but logits on {logits.device}")


def check(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, reduction: str, label_smoothing: float,
    softcap: float, z_loss: float,
) -> None:  # fmt: skip
    """Raises ValueError for what the public function does not take."""
    if input.ndim < 1 or not input.is_floating_point():
        raise ValueError(f"input must be floating point (N, C, …) or (C,), not {input.dtype} {tuple(input.shape)}")
    if target.device != input.device:
        raise ValueError(f"target is on {target.device}, but input on {input.device}")
    spread = target.is_floating_point()
    classes = input.shape[min(input.ndim - 1, 1)]
    expected = input.shape if spread else (*input.shape[:1], *input.shape[2:]) if input.ndim > 1 else ()
    if tuple(target.shape) != tuple(expected):
        raise ValueError(f"expected target {tuple(expected)} for input {tuple(input.shape)}, not {tuple(target.shape)}")
    if not spread and target.dtype not in (torch.int64, torch.uint8):
        raise ValueError(f"target must be int64, or probabilities in floating point, not {target.dtype}")
    if weight is not None and (tuple(weight.shape) != (classes,) or weight.device != input.device):
        place = f"{tuple(weight.shape)} on {weight.device}"
        raise ValueError(f"expected weight ({classes},) on {input.device}, not {place}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, not {label_smoothing}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must not be negative, infinite or NaN, not {softcap}")
    if z_loss and (spread or weight is not None):
        raise ValueError("z_loss takes class indices as targets, and no weight")
