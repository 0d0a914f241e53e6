"""o = softmax(scale · q kᵀ) v without the matrix of scores ever in memory (FlashAttention-2, Dao 2023)."""

from __future__ import annotations

from typing import Any

import torch

from tilebook import dispatch
from tilebook.autograd import once
from tilebook.kernels.attention.backward import attention_bwd
from tilebook.kernels.attention.forward import attention_fwd
from tilebook.kernels.attention.peers import sdpa

__all__ = ["attention"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool,
        scale: float,
        choice: dispatch.Choice,
    ) -> torch.Tensor:
        o, lse = choice(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = causal, scale, choice
        return o

    @staticmethod
    @once
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        if do.stride(-1) != 1:  # a gradient expanded from a sum, say
            do = do.contiguous()
        causal, scale, choice = ctx.call
        return *choice.follow(attention_bwd, (do,), do, q, k, v, o, lse, causal, scale), None, None, None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes tensors of shape (batch, heads, sequence, head dimension); {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q, k and v must have the same batch size; {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must have the same head dimension; {shapes}")
    if (q.shape[1] % k.shape[1]) if k.shape[1] else q.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of the heads of k and v; {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, scale: float | None = None
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v, with the fastest kernel known for this GPU and these shapes; differentiable once.

    Args:
        q: queries (B, H, Sq, D). Any strides.
        k: keys (B, Hkv, Sk, D). Hkv divides H; query head h reads key/value head h // (H / Hkv).
        v: values (B, Hkv, Sk, D).
        causal: row i sees columns 0 … i, aligned at the top left as in PyTorch, also where Sq ≠ Sk.
        scale: what the scores are multiplied by; D^-0.5 if None.

    Returns:
        o (B, H, Sq, D), in the dtype of q and with its order of axes in memory.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together.

    Kernels serve bf16 and fp16 on a GPU with D a power of two from 16 to 256 and scale > 0, sums in fp32; everything
    else goes to `torch.nn.functional.scaled_dot_product_attention`. Under autocast inputs are cast as there.

    The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691).
    """
    kind = q.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    factor = scale
    if factor is None:
        factor = q.shape[-1] ** -0.5 if q.ndim and q.shape[-1] else 0.0
    choice = dispatch.known(attention_fwd, q, k, v, causal, factor)
    if choice is None or choice.source == "fallback":
        _check(q, k, v)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        usual = q.numel() and k.numel() and factor > 0
        choice = dispatch.find(attention_fwd, q, k, v, causal, factor) if usual else None
        if choice is None:
            return sdpa(q, k, v, causal, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        o: torch.Tensor = _Attention.apply(q, k, v, causal, factor, choice)
        return o
    return choice(q, k, v, causal, factor)[0]
