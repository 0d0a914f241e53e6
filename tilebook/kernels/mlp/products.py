"""The MLP's three products: up with the activation, down, and the activation's backward; ours beside PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook import op
from tilebook.kernels.mlp.kernels import act_bwd_kernel, down_fwd_kernel, up_fwd_kernel
from tilebook.kernels.mlp.problem import BackwardProblem, DownProblem, Problem, UpProblem
from tilebook.kernels.mlp.pytorch import act
from tilebook.kernels.mlp.space import SPACE
from tilebook.launch import launch
from tilebook.op import Config

_SMALL = 1 << 21
"""Rows times widths of both layers, below which a product takes a GPU a few microseconds."""


def _act_bwd(dh: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        dz: torch.Tensor = torch.ops.aten.threshold_backward(dh, z, 0)
    else:
        dz = torch.ops.aten.gelu_backward(dh, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return dz


def fused(problem: Problem) -> bool:
    """PyTorch's products serve, but for those so small that the host's cost is all there is: ours are fewer calls."""
    return problem.rows * problem.width * problem.inner > _SMALL


@op.define("mlp_up_fwd", UpProblem, fused=fused)
def mlp_up_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = act(z), z = x W1ᵀ + b1. Without `save`, z is not kept: an empty tensor stands for it."""
    z = F.linear(x, w1, b1)
    return act(z, activation), z if save else z.new_empty(0)


@op.define("mlp_down_fwd", DownProblem, fused=fused)
def mlp_down_fwd(h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> tuple[torch.Tensor]:
    """y = h W2ᵀ + b2."""
    return (F.linear(h, w2, b2),)


@op.define("mlp_act_bwd", BackwardProblem, direction="bwd", fused=fused)
def mlp_act_bwd(
    dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz = (dy W2) ⊙ act′(z), and h = act(z) again, which the forward did not keep."""
    return _act_bwd(dy @ w2, z, activation), act(z, activation)


# Ours


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows that do not overlap; a copy only where it is not so."""
    if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]:
        return tensor
    return tensor.contiguous()


def _start(
    kernel: Any,
    config: Config,
    a: torch.Tensor,
    b: torch.Tensor,
    b_is_kn: bool,
    vectors: tuple[torch.Tensor, ...],
    tiles: tuple[torch.Tensor, ...],
    **constants: Any,
) -> None:
    """Starts `kernel` on operands a (M, K) and b, a bias of N, and contiguous (M, N) tensors of the epilogue."""
    m, k = a.shape
    n = b.shape[1 if b_is_kn else 0]
    block_m, block_n, block_k = config.number("BLOCK_M"), config.number("BLOCK_N"), config.number("BLOCK_K")
    # Hardware takes 16-byte aligned rows only; what a caller's view does not offer, pointers do.
    descriptors = config.number("DESCRIPTORS")
    if descriptors and not all(t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (a, b, *tiles)):
        descriptors = 0
    # Columns that the epilogue works on at a time: 32 values a thread keep its intermediates in registers.
    part = 32 * 32 * config.number("num_warps") // block_m
    left, right, outputs = a, b, tiles
    if descriptors:
        left = _described(a, block_m, block_k)
        right = _described(b, block_k, block_n) if b_is_kn else _described(b, block_n, block_k)
    if descriptors == 2:
        outputs = tuple(_described(t, block_m, min(part, block_n)) for t in tiles)
    launch(
        kernel,
        (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        left,
        right,
        *vectors,
        *outputs,
        a.stride(0),
        b.stride(0),
        m,
        n,
        k,
        EVEN_N=n % block_n == 0,
        EVEN_K=k % block_k == 0,
        **{**config, "DESCRIPTORS": descriptors},
        PART=part,
        **constants,
    )


def _described(tensor: torch.Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


@mlp_up_fwd.implementation("triton", space=SPACE, supports=lambda problem: problem.dtype in ("bf16", "fp16"))
def _triton_up(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str, save: bool, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x.new_empty(x.shape[0], w1.shape[0])
    z = torch.empty_like(h) if save else x.new_empty(0)
    # What is not saved is not written, but the kernel takes a tensor for it all the same.
    outputs = (h, z if save else h)
    _start(up_fwd_kernel, config, rows_of(x), rows_of(w1), False, (b1,), outputs, ACTIVATION=activation, SAVE=save)
    return h, z


@mlp_down_fwd.implementation("triton", space=SPACE, supports=lambda problem: problem.dtype in ("bf16", "fp16"))
def _triton_down(h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor, *, config: Config) -> tuple[torch.Tensor]:
    y = h.new_empty(h.shape[0], w2.shape[0])
    _start(down_fwd_kernel, config, rows_of(h), rows_of(w2), False, (b2,), (y,))
    return (y,)


@mlp_act_bwd.implementation("triton", space=SPACE, supports=lambda problem: problem.dtype in ("bf16", "fp16"))
def _triton_bwd(
    dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    dz, h = torch.empty_like(z), torch.empty_like(z)
    _start(act_bwd_kernel, config, rows_of(dy), rows_of(w2), True, (), (z, dz, h), ACTIVATION=activation)
    return dz, h


# PyTorch's, as the references have it

for each in (mlp_up_fwd, mlp_down_fwd, mlp_act_bwd):
    each.implementation("torch")(each.reference)
