"""How the kernels that add two tensors up are started."""

from __future__ import annotations

import torch
import triton

from tilebook.kernels.addition.kernels import flat_kernel, turned_kernel
from tilebook.launch import launch
from tilebook.op import Config


def added(x: torch.Tensor, y: torch.Tensor, *, config: Config) -> torch.Tensor:
    """x + y, both (n,), or (B, S, N) of which one lies as (B, N, S) in memory; strides as those of x."""
    high, wide = config.number("ROWS"), config.number("COLUMNS")
    dtype = x.dtype if x.dtype == y.dtype else torch.float32
    out = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
    if x.ndim == 1:
        grid = (triton.cdiv(x.numel(), high * wide),)
        launch(flat_kernel, grid, x, y, out, x.numel(), BLOCK=high * wide, num_warps=config["num_warps"])
        return out
    batch, rows, width = x.shape
    grid = (batch * triton.cdiv(rows, high) * triton.cdiv(width, wide),)
    launch(
        turned_kernel, grid, x, y, out, rows, width, FIRST=x.stride(-1) != 1, ROWS=high, COLUMNS=wide,
        num_warps=config["num_warps"],
    )  # fmt: skip
    return out
