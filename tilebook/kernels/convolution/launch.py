"""How the kernels of a convolution's weight gradient are started."""

from __future__ import annotations

import torch
import triton

from tilebook.kernels.convolution.kernels import SIDE, join_kernel, lay_kernel, weight_kernel
from tilebook.launch import launch
from tilebook.op import Config
from tilebook.windows import Form

_JOINED = 1024
"""Elements that a program adds up."""


def _laid(x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    """(B, H, W, C) with the padding around, of x (B, C, H, W)."""
    (batch, channels, height, width), (above, beside) = x.shape, padding
    out = x.new_empty(batch, height + 2 * above, width + 2 * beside, channels)
    blocks = triton.cdiv(out.shape[1] * out.shape[2], SIDE.value) * triton.cdiv(channels, SIDE.value)
    launch(lay_kernel, (batch * blocks,), x, out, channels, H=height, W=width, PAD_H=above, PAD_W=beside, num_warps=4)
    return out


def weight(dy: torch.Tensor, x: torch.Tensor, form: str, *, config: Config) -> torch.Tensor:
    """dW (O, C, kernel height, kernel width)."""
    kernel, stride, padding = Form.read(form)
    (batch, outputs, *made), inputs = dy.shape, x.shape[1]
    images, gradients = _laid(x.contiguous(), padding), _laid(dy.contiguous(), (0, 0))
    taps, positions = kernel[0] * kernel[1], batch * made[0] * made[1]
    block_o, block_c, block_k = (config.number(name) for name in ("BLOCK_O", "BLOCK_C", "BLOCK_K"))
    rows = triton.cdiv(triton.cdiv(positions, config.number("SPLIT")), block_k) * block_k
    splits = triton.cdiv(positions, rows)
    parts = torch.empty((splits, outputs, taps * inputs), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(outputs, block_o) * triton.cdiv(inputs, block_c) * triton.cdiv(taps, config.number("TAPS"))
    launch(
        weight_kernel, (tiles * splits,), gradients, images, parts, positions, rows, inputs, outputs,
        MADE=tuple(made), LAID=tuple(images.shape[1:3]), KERNEL=kernel, STRIDE=stride,
        BLOCK_O=block_o, BLOCK_C=block_c, TAPS=config.number("TAPS"), BLOCK_K=block_k,
        EVEN_O=outputs % block_o == 0, EVEN_C=inputs % block_c == 0,
        num_warps=config.number("num_warps"), num_stages=config.number("num_stages"),
    )  # fmt: skip
    dw = x.new_empty(outputs, inputs, *kernel)
    programs = outputs * triton.cdiv(taps * inputs, _JOINED)
    launch(join_kernel, (programs,), parts, dw, splits, outputs, inputs, taps, BLOCK=_JOINED, num_warps=4)
    return dw
