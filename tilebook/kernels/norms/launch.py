"""How the norms' kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tilebook import device as devices
from tilebook.kernels.norms.kernels import bwd_kernel, fwd_kernel, sum_kernel
from tilebook.launch import launch
from tilebook.op import Config

Vector = torch.Tensor | None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows; a copy only where it is not so."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _vector(tensor: Vector) -> Vector:
    """The vector with its elements side by side, as the kernels step through it."""
    return None if tensor is None else tensor.contiguous()


def _columns(width: int, config: Config) -> dict[str, Any]:
    block = min(config.number("BLOCK"), triton.next_power_of_2(width))
    return {"ROWS": config["ROWS"], "BLOCK": block, "WHOLE": block >= width, "num_warps": config["num_warps"]}


def forward(
    x: torch.Tensor, weight: Vector, bias: Vector, eps: float, config: Config, *, centred: bool
) -> tuple[torch.Tensor, ...]:
    """y (M, N), then, each (M,) in fp32, the mean of each row if `centred`, and rstd."""
    x, (rows, width) = _rows(x), x.shape
    y, rstd = x.new_empty(rows, width), x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    launch(
        fwd_kernel, (triton.cdiv(rows, config.number("ROWS")),), x, _vector(weight), _vector(bias), y, mean, rstd,
        rows, width, x.stride(0), eps, **_columns(width, config),
    )  # fmt: skip
    return (y, rstd) if mean is None else (y, mean, rstd)


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: Vector, bias: Vector, mean: Vector, rstd: torch.Tensor, *, config: Config
) -> tuple[torch.Tensor, ...]:
    """dx, then dweight and dbias where there are a weight and a bias, in their dtypes. No bias without a weight."""
    dy, x, (rows, width) = _rows(dy), _rows(x), x.shape
    dx = x.new_empty(rows, width)
    # Interpreted, on the CPU: a few programs that each take several turns.
    sms = 3 if x.is_cpu else devices.current(x.device.index or 0).sm_count
    programs = min(triton.cdiv(rows, config.number("ROWS")), sms * config.number("PER_SM"))
    given = [vector for vector in (weight, bias) if vector is not None]
    shares: list[Any] = [x.new_empty(programs, width, dtype=torch.float32) for _ in given]
    sums: list[Any] = [vector.new_empty(width) for vector in given]
    none = [None] * (2 - len(given))
    launch(
        bwd_kernel, (programs,), dy, x, _vector(weight), _vector(mean), _vector(rstd), dx, *shares, *none,
        rows, width, dy.stride(0), x.stride(0), **_columns(width, config),
    )  # fmt: skip
    if sums:
        launch(
            sum_kernel, (triton.cdiv(width, 32),), *shares, *none, *sums, *none, programs, width,
            ROWS=64, BLOCK=32, num_warps=4,
        )  # fmt: skip
    return dx, *sums


def rms_norm_fwd(x: torch.Tensor, weight: Vector, eps: float, *, config: Config) -> tuple[torch.Tensor, ...]:
    return forward(x, weight, None, eps, config, centred=False)


def rms_norm_bwd(
    dy: torch.Tensor, x: torch.Tensor, weight: Vector, rstd: torch.Tensor, *, config: Config
) -> tuple[torch.Tensor, ...]:
    return backward(dy, x, weight, None, None, rstd, config=config)
