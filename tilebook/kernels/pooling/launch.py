"""How the kernel of max pooling's gradient is started."""

from __future__ import annotations

import torch
import triton

from tilebook.kernels.pooling.kernels import gather_kernel
from tilebook.kernels.pooling.problem import by_channels, order, reaching
from tilebook.launch import launch
from tilebook.op import Config
from tilebook.windows import Form


def gradient(
    dy: torch.Tensor, indices: torch.Tensor, height: int, width: int, form: str, *, config: Config
) -> torch.Tensor:
    """dx (B, C, height, width), laid as `indices` are."""
    (kernel, stride, padding), (batch, channels, high, wide) = Form.read(form), dy.shape
    last = by_channels(indices)
    laid = order(last)
    dx = torch.empty((batch, channels, height, width), dtype=dy.dtype, device=dy.device, memory_format=laid)
    planes, inner = (batch, channels) if last else (batch * channels, 1)
    block, cells = config.number("BLOCK"), triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    (first_h, over_h), (first_w, over_w) = (reaching(*each) for each in zip(kernel, stride, padding, strict=True))
    launch(
        gather_kernel, (planes * triton.cdiv(cells * inner, block),), dy.contiguous(memory_format=laid),
        indices.contiguous(memory_format=laid), dx, INNER=inner, H=height, W=width, HIGH=high, WIDE=wide,
        STRIDE_H=stride[0], STRIDE_W=stride[1], FIRST_H=first_h, FIRST_W=first_w, OVER_H=over_h, OVER_W=over_w,
        PAIRS=stride[1] == 2 and width % 2 == 0 and inner == 1, BLOCK=block, num_warps=config.number("num_warps"),
    )  # fmt: skip
    return dx
