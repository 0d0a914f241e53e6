"""How the norms' kernels are started."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from tilebook import device as devices
from tilebook.kernels.norms.kernels import bwd_kernel, fwd_kernel, sum_kernel
from tilebook.launch import launch
from tilebook.layout import VECTOR, beside
from tilebook.op import Config

Vector = torch.Tensor | None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows; a copy only where it is not so."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _laid(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x, its step in memory and the unit that the step is told in, 0 for a matrix whose rows are contiguous.

    A power of two, as many elements as can be loaded at once: one binary serves all lengths that it divides.
    """
    if x.ndim == 3 and (length := beside(x)):
        unit = math.gcd(length, VECTOR // x.itemsize)
        return x, length // unit, unit
    x = _rows(x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x)
    return x, x.stride(0), 0


def _tiles(x: torch.Tensor, unit: int, config: Config) -> int:
    """Of so many rows that a program takes at a time. None has rows of two batches."""
    rows = config.number("ROWS")
    batches, length = (x.shape[0], x.shape[1]) if unit else (1, x.shape[0])
    return int(batches * triton.cdiv(length, rows))


def _vector(tensor: Vector) -> Vector:
    """The vector with its elements side by side, as the kernels step through it."""
    return None if tensor is None else tensor.contiguous()


def _columns(width: int, config: Config) -> dict[str, Any]:
    block = min(config.number("BLOCK"), triton.next_power_of_2(width))
    return {"ROWS": config["ROWS"], "BLOCK": block, "WHOLE": block >= width, "num_warps": config["num_warps"]}


def forward(
    x: torch.Tensor, weight: Vector, bias: Vector, eps: float, config: Config, *, centred: bool, residual: Vector = None
) -> tuple[torch.Tensor, ...]:
    """y (M, N), x + residual where there is one, then, each (M,) in fp32, the mean of each row if `centred`, and rstd.

    x may lie transposed where there is no residual.
    """
    (x, step, unit), width = _laid(x), x.shape[-1]
    rows = x.numel() // width
    y, rstd = x.new_empty(rows, width), x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    residual = None if residual is None else _rows(residual)
    total = None if residual is None else x.new_empty(rows, width)
    launch(
        fwd_kernel, (_tiles(x, unit, config),), x, residual, _vector(weight), _vector(bias), y, total, mean, rstd,
        rows, width, step, None if residual is None else residual.stride(0), eps, **_columns(width, config), UNIT=unit,
    )  # fmt: skip
    return tuple(each for each in (y, total, mean, rstd) if each is not None)


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: Vector, bias: Vector, mean: Vector, rstd: torch.Tensor, *,
    config: Config, dtotal: Vector = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dx, then dweight and dbias where there are a weight and a bias, in their dtypes. No bias without a weight.

    dtotal: what else there is of the gradient of x.
    """
    dy, (x, step, unit), (rows, width) = _rows(dy), _laid(x), dy.shape
    dtotal = None if dtotal is None else _rows(dtotal)
    dx = x.new_empty(rows, width)
    # Interpreted, on the CPU: a few programs that each take several turns.
    sms = 3 if x.is_cpu else devices.current(x.device.index or 0).sm_count
    programs = min(_tiles(x, unit, config), sms * config.number("PER_SM"))
    given = [vector for vector in (weight, bias) if vector is not None]
    shares: list[Any] = [x.new_empty(programs, width, dtype=torch.float32) for _ in given]
    sums: list[Any] = [vector.new_empty(width) for vector in given]
    none = [None] * (2 - len(given))
    launch(
        bwd_kernel, (programs,), dy, dtotal, x, _vector(weight), _vector(mean), _vector(rstd), dx, *shares, *none,
        rows, width, dy.stride(0), None if dtotal is None else dtotal.stride(0), step, **_columns(width, config),
        UNIT=unit,
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
