"""How the kernels of gated linear units are started."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tilebook.kernels.glu.kernels import bwd_kernel, fwd_kernel
from tilebook.launch import launch
from tilebook.layout import rows
from tilebook.op import Config


def _start(kernel: Any, config: Config, count: int, width: int, activation: str, *args: Any) -> None:
    block = min(config.number("BLOCK"), triton.next_power_of_2(width))
    programs = triton.cdiv(count, config.number("ROWS")) * triton.cdiv(width, block)
    launch(
        kernel, (programs,), *args, ACTIVATION=activation, ROWS=config["ROWS"], BLOCK=block,
        num_warps=config["num_warps"],
    )  # fmt: skip


def forward(gate: torch.Tensor, up: torch.Tensor | None, activation: str, *, config: Config) -> torch.Tensor:
    """h (M, F)."""
    gate, up, count = rows(gate), up if up is None else rows(up), gate.shape[0]
    width = gate.shape[1] if up is not None else gate.shape[1] // 2
    h = gate.new_empty(count, width)
    strides = gate.stride(0), 0 if up is None else up.stride(0)
    _start(fwd_kernel, config, count, width, activation, gate, up, h, count, width, *strides)
    return h


def backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, again: bool, *, config: Config
) -> tuple[torch.Tensor, ...]:
    """dgate and dup (M, F), or one tensor (M, 2F) for both; then h (M, F) if `again`."""
    dh, gate, up, (count, width) = rows(dh), rows(gate), up if up is None else rows(up), dh.shape
    dgate = gate.new_empty(count, gate.shape[1])
    dup = None if up is None else up.new_empty(count, width)
    h = gate.new_empty(count, width) if again else None
    strides = dh.stride(0), gate.stride(0), 0 if up is None else up.stride(0)
    _start(bwd_kernel, config, count, width, activation, dh, gate, up, dgate, dup, h, count, width, *strides)
    return tuple(each for each in (dgate, dup, h) if each is not None)
