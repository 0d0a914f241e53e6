"""Norms in PyTorch's own functions, differentiable by its autograd: what runs where no kernel serves."""

from __future__ import annotations

from typing import Any

import torch


def rms(tensors: tuple[Any, ...], options: tuple[float]) -> torch.Tensor:
    """RMSNorm's y for an entry's tensors (x, weight), weight None or not, and options (eps,)."""
    (x, weight), (eps,) = tensors, options
    if weight is None or weight.dtype == x.dtype:
        return torch.rms_norm(x, x.shape[-1:], weight, eps)
    return torch.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
