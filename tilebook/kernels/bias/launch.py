"""How the kernels that sum rows up are started."""

from __future__ import annotations

import torch
import triton

from tilebook.kernels.bias.kernels import part_kernel, total_kernel
from tilebook.launch import launch
from tilebook.layout import rows
from tilebook.op import Config

_COLUMNS = 32
"""That a program adds the parts of."""


def total(dy: torch.Tensor, *, config: Config) -> torch.Tensor:
    """Σ dy (M, N) over its rows, (N,) in fp32."""
    dy, (count, width) = rows(dy), dy.shape
    block, high = config.number("BLOCK"), config.number("ROWS")
    share = triton.cdiv(triton.cdiv(count, config.number("SPLIT")), high) * high
    splits = triton.cdiv(count, share)
    parts, out = (dy.new_empty(shape, dtype=torch.float32) for shape in ((splits, width), (width,)))
    programs = splits * triton.cdiv(width, block)
    launch(
        part_kernel, (programs,), dy, parts, count, share, width, dy.stride(0), BLOCK=block, ROWS=high,
        num_warps=config["num_warps"],
    )  # fmt: skip
    launch(
        total_kernel, (triton.cdiv(width, _COLUMNS),), parts, out, splits, width, BLOCK=_COLUMNS,
        SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return out
