"""How the kernel of rotary position embedding is started."""

from __future__ import annotations

import torch
import triton

from tilebook.kernels.rope.kernels import Angles, Heads, rope_kernel
from tilebook.launch import launch
from tilebook.layout import rows
from tilebook.op import Config


def _heads(x: torch.Tensor, y: torch.Tensor) -> Heads:
    x_b, x_h, x_s, _ = x.stride()
    y_b, y_h, y_s, _ = y.stride()
    return Heads(x, y, x.shape[1], x_b, x_h, x_s, y_b, y_h, y_s)


def _start(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, config: Config,
    *, backward: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, cos, sin = rows(q), rows(k), rows(cos), rows(sin)
    # What is like a tensor with holes has none, and its axes in the same order.
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    steps = [x.stride()[:2] if x.shape[0] > 1 else (0, x.stride(1)) for x in (cos, sin)]
    angles = Angles(cos, sin, *steps[0], *steps[1])
    (batch, heads, seq, width), rotated = q.shape, cos.shape[2]
    together, rest = config.number("HEADS"), width - rotated
    parts = triton.cdiv(heads, together) + triton.cdiv(k.shape[1], together)
    launch(
        rope_kernel, (batch * triton.cdiv(seq, config.number("ROWS")) * parts,),
        _heads(q, out_q), _heads(k, out_k), angles, seq,
        ROTATED=rotated, WIDTH=width, INTERLEAVED=interleaved, BACKWARD=backward,
        HALF=triton.next_power_of_2(rotated // 2), REST=triton.next_power_of_2(rest) if rest else 0,
        ROWS=config["ROWS"], HEADS=together, num_warps=config["num_warps"],
    )  # fmt: skip
    return out_q, out_k


def forward(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated, laid out as they are."""
    return _start(q, k, cos, sin, interleaved, config, backward=False)


def backward(
    dq: torch.Tensor, dk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of q and k."""
    return _start(dq, dk, cos, sin, interleaved, config, backward=True)
