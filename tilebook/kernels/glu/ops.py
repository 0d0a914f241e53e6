"""The ops of gated linear units with their references, and what computes them."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilebook import inductor, op
from tilebook.kernels.glu import launch
from tilebook.kernels.glu.problem import BackwardProblem, Glu, Problem
from tilebook.kernels.glu.pytorch import HOST_BOUND, act, halves, plain
from tilebook.kernels.glu.space import SPACE

Outputs = tuple[torch.Tensor, ...]


def fused(problem: Glu) -> bool:
    """PyTorch's two functions serve, unless a verdict has ours ahead."""
    return True


# References, in fp64: fp32 inputs are judged too


@op.define("glu_fwd", Problem, fused=fused)
def glu_fwd(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    """h = act(gate) · up (M, F); gate and up (M, F), or gate (M, 2F) with up in its second half and None."""
    return _forward(torch.float64, gate, up, activation)


@op.define("glu_bwd", BackwardProblem, direction="bwd", fused=fused)
def glu_bwd(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, again: bool) -> Outputs:
    """dgate = dh · up · act′(gate) and dup = dh · act(gate), side by side in one tensor as gate and up are.

    Then, if `again`, h, which need not have been kept.
    """
    return _backward(torch.float64, dh, gate, up, activation, again)


def _forward(dtype: torch.dtype, gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    g, u = halves(gate, up)
    return (act(g.to(dtype), activation) * u.to(dtype)).to(gate.dtype)


def _derivative(g: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        share = torch.sigmoid(g)
        return share * (1 + g * (1 - share))
    if activation == "gelu":
        density = torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(g / math.sqrt(2))) + g * density
    bend = torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g * g * g))
    inner = math.sqrt(2 / math.pi) * (1 + 0.134145 * g * g)
    return 0.5 * (1 + bend) + 0.5 * g * (1 - bend * bend) * inner


def _backward(
    dtype: torch.dtype, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, again: bool
) -> Outputs:
    (g, u), upper = (each.to(dtype) for each in halves(gate, up)), dh.to(dtype)
    passed = act(g, activation)
    grads = upper * u * _derivative(g, activation), upper * passed
    return _joined(grads, passed * u, up is None, again, gate.dtype)


def _joined(grads: Outputs, h: torch.Tensor, packed: bool, again: bool, dtype: torch.dtype) -> Outputs:
    found = [each.to(dtype) for each in grads]
    return *((torch.cat(found, -1),) if packed else found), *((h.to(dtype),) if again else ())


def supports(problem: Glu) -> bool:
    """Do our kernels serve it?"""
    return problem.dtype in ("bf16", "fp16", "fp32")


glu_fwd.implementation("triton", space=SPACE, supports=supports)(launch.forward)
glu_bwd.implementation("triton", space=SPACE, supports=supports)(launch.backward)


@glu_fwd.implementation("torch")
def _torch_fwd(gate: torch.Tensor, up: torch.Tensor | None, activation: str) -> torch.Tensor:
    return plain((gate, up), (activation,))


@glu_bwd.implementation("torch")
def _torch_bwd(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, again: bool) -> Outputs:
    """What PyTorch's autograd runs, and first the activation, which its forward pass has kept."""
    g, u = halves(gate, up)
    passed = act(g, activation)
    if activation == "silu":
        dgate: Any = torch.ops.aten.silu_backward(dh * u, g)
    else:
        how = "tanh" if activation == "gelu_tanh" else "none"
        dgate = torch.ops.aten.gelu_backward(dh * u, g, approximate=how)
    return _joined((dgate, dh * passed), passed * u if again else passed, up is None, again, gate.dtype)


def outlasts_the_host(problem: Glu) -> bool:
    return problem.rows * problem.width > HOST_BOUND


inductor.register(glu_fwd, _forward, torch.float32, supports=outlasts_the_host)
inductor.register(glu_bwd, _backward, torch.float32, supports=outlasts_the_host)

glu_fwd.backward = glu_bwd
