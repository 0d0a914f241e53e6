"""MLP block: y = act(x W1ᵀ + b1) W2ᵀ + b2, with GELU (Hendrycks & Gimpel, 2016) or ReLU between two linear layers.

Two kernels forward, one backward; the rest of the backward is plain products, which are cuBLAS's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from tilebook import dispatch, op
from tilebook.kernels.mlp.kernels import act_bwd_kernel, down_fwd_kernel, up_fwd_kernel
from tilebook.kernels.mlp.problem import ACTIVATIONS, BackwardProblem, DownProblem, UpProblem
from tilebook.kernels.mlp.space import SPACE
from tilebook.launch import launch
from tilebook.op import Config

__all__ = ["mlp"]


def _act(z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        return F.relu(z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _act_bwd(dh: torch.Tensor, z: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu":
        dz: torch.Tensor = torch.ops.aten.threshold_backward(dh, z, 0)
    else:
        dz = torch.ops.aten.gelu_backward(dh, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return dz


@op.define("mlp_up_fwd", UpProblem)
def mlp_up_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = act(z), z = x W1ᵀ + b1. Without `save`, z is not kept: an empty tensor stands for it."""
    z = F.linear(x, w1, b1)
    return _act(z, activation), z if save else z.new_empty(0)


@op.define("mlp_down_fwd", DownProblem)
def mlp_down_fwd(h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> tuple[torch.Tensor]:
    """y = h W2ᵀ + b2."""
    return (F.linear(h, w2, b2),)


@op.define("mlp_act_bwd", BackwardProblem, direction="bwd")
def mlp_act_bwd(
    dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz = (dy W2) ⊙ act′(z), and h = act(z) again, which the forward did not keep."""
    return _act_bwd(dy @ w2, z, activation), _act(z, activation)


# Ours


def _rows(tensor: torch.Tensor) -> torch.Tensor:
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
    _start(up_fwd_kernel, config, _rows(x), _rows(w1), False, (b1,), outputs, ACTIVATION=activation, SAVE=save)
    return h, z


@mlp_down_fwd.implementation("triton", space=SPACE, supports=lambda problem: problem.dtype in ("bf16", "fp16"))
def _triton_down(h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor, *, config: Config) -> tuple[torch.Tensor]:
    y = h.new_empty(h.shape[0], w2.shape[0])
    _start(down_fwd_kernel, config, _rows(h), _rows(w2), False, (b2,), (y,))
    return (y,)


@mlp_act_bwd.implementation("triton", space=SPACE, supports=lambda problem: problem.dtype in ("bf16", "fp16"))
def _triton_bwd(
    dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str, *, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    dz, h = torch.empty_like(z), torch.empty_like(z)
    _start(act_bwd_kernel, config, _rows(dy), _rows(w2), True, (), (z, dz, h), ACTIVATION=activation)
    return dz, h


# PyTorch's


@mlp_up_fwd.implementation("torch")
def _torch_up(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, activation: str, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    z = F.linear(x, w1, b1)
    return _act(z, activation), z if save else z.new_empty(0)


@mlp_down_fwd.implementation("torch")
def _torch_down(h: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> tuple[torch.Tensor]:
    return (F.linear(h, w2, b2),)


@mlp_act_bwd.implementation("torch")
def _torch_bwd(
    dy: torch.Tensor, w2: torch.Tensor, z: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _act_bwd(torch.mm(dy, w2), z, activation), _act(z, activation)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor,
        w2: torch.Tensor,
        b2: torch.Tensor,
        activation: str,
        choice: dispatch.Choice,
    ) -> torch.Tensor:
        save = any(ctx.needs_input_grad[:4])
        h, z = choice(x, w1, b1, activation, save) if save else dispatch.run(mlp_up_fwd, x, w1, b1, activation, False)
        ctx.activation = activation
        if save:
            ctx.save_for_backward(x, z, w1, w2)
        return dispatch.run(mlp_down_fwd, h, w2, b2)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = dw1 = db1 = dw2 = None
        need_x, need_w1, need_b1, need_w2, need_b2, *_ = ctx.needs_input_grad
        if need_x or need_w1 or need_b1 or need_w2:
            x, z, w1, w2 = ctx.saved_tensors
            if need_x or need_w1 or need_b1:
                dz, h = dispatch.run(mlp_act_bwd, dy, w2, z, ctx.activation)
                dx = torch.mm(dz, w1) if need_x else None
                dw1 = torch.mm(dz.t(), x) if need_w1 else None
                db1 = dz.sum(0) if need_b1 else None
            else:
                h = _act(z, ctx.activation)
            dw2 = torch.mm(dy.t(), h) if need_w2 else None
        return dx, dw1, db1, dw2, dy.sum(0) if need_b2 else None, None, None


def mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
) -> torch.Tensor:
    """y = act(x W1ᵀ + b1) W2ᵀ + b2, the two-layer block of a transformer (Vaswani et al., 2017, §3.3).

    The activation is computed with the first product, and its derivative with the product that needs it. Between
    forward and backward only z = x W1ᵀ + b1 is kept beside the inputs: act(z) is computed again, not stored.

    Args:
        x: (…, H), floating point; any strides, fastest where the last axis is contiguous.
        w1: (I, H), as `torch.nn.Linear(H, I).weight` is.
        b1: (I,), or None.
        w2: (H, I), as `torch.nn.Linear(I, H).weight` is.
        b2: (H,), or None.
        activation: "gelu" (x Φ(x), Hendrycks & Gimpel, 2016), "gelu_tanh" (their approximation) or "relu".

    Returns:
        (…, H) in the dtype of x; under autocast in autocast's dtype, as `torch.nn.functional.linear` does.

    Kernels of ours run for fp16 and bf16 on a GPU, with fp32 accumulation; all else (other dtypes, the CPU, no bias, an
    empty x) runs as plain PyTorch, with the same result. Differentiable once in every tensor.

    Raises:
        ValueError: ranks, sizes, dtypes or devices that do not fit together, or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if torch.is_autocast_enabled(x.device.type):
        x, w1, w2 = _autocast(x), _autocast(w1), _autocast(w2)
        b1, b2 = (None if bias is None else _autocast(bias) for bias in (b1, b2))
    training = torch.is_grad_enabled()
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.ndim else x
    choice = dispatch.known(mlp_up_fwd, flat, w1, b1, activation, training)
    if choice is None or choice.source == "fallback" or not _fits(w2, b2, w1):
        _check(x, w1, b1, w2, b2)
        usual = b1 is not None and b2 is not None and x.numel() and w1.numel()
        choice = dispatch.find(mlp_up_fwd, flat, w1, b1, activation, training) if usual else None
        if choice is None:
            return F.linear(_act(F.linear(x, w1, b1), activation), w2, b2)
    if training:
        y: torch.Tensor = _MLP.apply(flat, w1, b1, w2, b2, activation, choice)
    else:
        (y,) = dispatch.run(mlp_down_fwd, choice(flat, w1, b1, activation, False)[0], w2, b2)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def _check(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None
) -> None:
    if x.ndim < 1 or w1.ndim != 2 or w2.ndim != 2:
        raise ValueError(
            f"expected x (…, H), w1 (I, H) and w2 (H, I), not shapes {_shape(x)}, {_shape(w1)} and {_shape(w2)}"
        )
    inner, width = w1.shape
    if x.shape[-1] != width or w2.shape != (width, inner):
        raise ValueError(
            f"w1 {_shape(w1)} asks for x (…, {width}) and w2 ({width}, {inner}), not {_shape(x)} and {_shape(w2)}"
        )
    for name, bias, size in (("b1", b1, inner), ("b2", b2, width)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), not {_shape(bias)}")
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}")


def _fits(w2: torch.Tensor, b2: torch.Tensor | None, w1: torch.Tensor) -> bool:
    """Does the second layer go with the first, which has been seen before?"""
    inner, width = w1.shape
    return (
        b2 is not None
        and w2.shape == (width, inner)
        and b2.shape == (width,)
        and w2.dtype == b2.dtype == w1.dtype
        and w2.device == b2.device == w1.device
    )


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What autocast makes of an operand of a product: all floating point but fp64 takes its dtype."""
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
