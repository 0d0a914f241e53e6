"""How cross entropy's kernels are started."""

from __future__ import annotations

from typing import Any

import torch
import triton

from tilebook.kernels.cross_entropy.kernels import bwd_kernel, fwd_kernel
from tilebook.launch import launch
from tilebook.layout import VECTOR, rows
from tilebook.op import Config

_UNIT = 16
"""Triton takes a step for a multiple of whole vectors where it is one of this."""


def _columns(logits: torch.Tensor, config: Config) -> dict[str, Any]:
    width = logits.shape[1]
    block = min(config.number("BLOCK"), triton.next_power_of_2(width))
    together = config.number("ROWS") if block >= width else 1
    whole = logits.stride(0) % _UNIT == 0 and width % _UNIT == 0
    return {
        "ROWS": together,
        "BLOCK": block,
        "VECTOR": VECTOR // logits.itemsize,
        "RAGGED": together == 1 and not whole,
        "num_warps": config["num_warps"],
    }


def forward(
    logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, ignore_index: int, softcap: float,
    z_loss: float, *, config: Config,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """loss (M,) and lse (M,), in fp32."""
    logits, (count, width) = rows(logits), logits.shape
    loss, lse = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    columns = _columns(logits, config)
    launch(
        fwd_kernel, (triton.cdiv(count, columns["ROWS"]),), logits, target, loss, lse, count, width,
        logits.stride(0), target.stride(0), ignore_index, label_smoothing, softcap, z_loss,
        STAGES=config["STAGES"], SMOOTHED=label_smoothing != 0, CAPPED=softcap != 0, **columns,
    )  # fmt: skip
    return loss, lse


def backward(
    dloss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, label_smoothing: float,
    ignore_index: int, softcap: float, z_loss: float, *, config: Config,
) -> torch.Tensor:  # fmt: skip
    """dlogits (M, V) in the dtype of logits."""
    logits, (count, width) = rows(logits), logits.shape
    dlogits, columns = logits.new_empty(count, width), _columns(logits, config)
    chunks = triton.cdiv(width, columns["BLOCK"])
    programs = triton.cdiv(count, columns["ROWS"]) * chunks
    launch(
        bwd_kernel, (programs,), rows(dloss), logits, target, rows(lse), dlogits, count, width, logits.stride(0),
        target.stride(0), chunks, ignore_index, label_smoothing, softcap, z_loss,
        SAME=logits.stride(0) == width, CAPPED=softcap != 0, **columns,
    )  # fmt: skip
    return dlogits


def backward_in_place(
    dloss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, label_smoothing: float,
    ignore_index: int, softcap: float, z_loss: float, *, config: Config,
) -> None:  # fmt: skip
    """Writes dlogits over logits (M, V), of which a program reads what it writes, and nothing else.

    The rows may lie apart where a program takes one of them.
    """
    (count, width), columns = logits.shape, _columns(logits, config)
    chunks = triton.cdiv(width, columns["BLOCK"])
    launch(
        bwd_kernel, (triton.cdiv(count, columns["ROWS"]) * chunks,), dloss, logits, target, lse, logits, count, width,
        logits.stride(0), target.stride(0), chunks, ignore_index, label_smoothing, softcap, z_loss,
        SAME=True, CAPPED=softcap != 0, **columns,
    )  # fmt: skip
