"""How the norms' kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tilebook import device as devices
from tilebook.kernels.norms.kernels import bwd_kernel, fwd_kernel, sum_kernel
from tilebook.launch import launch
from tilebook.op import Config


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows; a copy only where it is not so."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _columns(width: int, config: Config) -> dict[str, Any]:
    block = min(config.number("BLOCK"), triton.next_power_of_2(width))
    return {"ROWS": config["ROWS"], "BLOCK": block, "WHOLE": block >= width, "num_warps": config["num_warps"]}


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, (rows, width) = _rows(x), weight.contiguous(), x.shape
    y, rstd = x.new_empty(rows, width), x.new_empty(rows, dtype=torch.float32)
    grid = (triton.cdiv(rows, config.number("ROWS")),)
    launch(fwd_kernel, grid, x, weight, y, rstd, rows, width, x.stride(0), eps, **_columns(width, config))
    return y, rstd


def rms_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    dy, x, weight, rstd, (rows, width) = _rows(dy), _rows(x), weight.contiguous(), rstd.contiguous(), x.shape
    dx, dweight = x.new_empty(rows, width), torch.empty_like(weight)
    # Interpreted, on the CPU: a few programs that each take several turns.
    sms = 3 if x.is_cpu else devices.current(x.device.index or 0).sm_count
    programs = min(triton.cdiv(rows, config.number("ROWS")), sms * config.number("PER_SM"))
    partial = x.new_empty(programs, width, dtype=torch.float32)
    launch(
        bwd_kernel, (programs,), dy, x, weight, rstd, dx, partial, rows, width, dy.stride(0), x.stride(0),
        **_columns(width, config),
    )  # fmt: skip
    launch(
        sum_kernel, (triton.cdiv(width, 32),), partial, dweight, programs, width, ROWS=64, BLOCK=32, num_warps=4
    )  # fmt: skip
    return dx, dweight
