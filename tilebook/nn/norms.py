"""Norms over the last axis."""

from __future__ import annotations

import torch
from torch import nn

from tilebook.enabling import layer_norm, rms_norm, takes_norm
from tilebook.hooks import usual
from tilebook.kernels.norms import add_layer_norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` by `tilebook.layer_norm`: same arguments, parameters, numbers and errors.

    Several axes, tensors of two dtypes, and what autocast computes in fp32 are PyTorch's.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` by `tilebook.rms_norm`: same arguments, parameters, numbers and errors.

    Without an eps of its own it is PyTorch's, as are several axes and tensors of two dtypes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def added(norm: nn.LayerNorm, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(h), h) of h = residual + x: in one pass where that is our kernel's to do and nobody listens to the norm."""
    alone = usual(norm, of=LayerNorm) and (x.dtype, x.shape) == (residual.dtype, residual.shape)
    if alone and takes_norm(x, norm.normalized_shape, (norm.weight, norm.bias), norm.eps):
        return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    h = residual + x
    return norm(h), h
