"""What PyTorch itself offers for attention, brought to the signature of our ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook.device import Device
from tilebook.kernels.attention import eager
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem

_aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)


def cudnn_available(device: Device) -> bool:
    return device.capability >= 80 and torch.backends.cudnn.is_available()


def cudnn_supports(problem: ForwardProblem | BackwardProblem) -> bool:
    return (
        problem.torch_dtype in _HALVES
        and problem.head_dim <= 128
        and problem.head_dim % 8 == 0
        and problem.heads == problem.heads_kv
        and problem.seq_q * problem.seq_k > 1
        # Its causal mask is aligned to the other corner where the lengths differ.
        and (not problem.causal or problem.seq_q == problem.seq_k)
    )


def cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return o, lse.view(q.shape[:-1])


def cudnn_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # not read: there is no dropout
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse[..., None], seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )
    return dq, dk, dv


def _flash_applies(q: torch.Tensor, k: torch.Tensor, causal: bool) -> bool:
    """Will SDPA on the GPU pick FlashAttention-2, whose log-sum-exp can then be had?"""
    return q.is_cuda and q.dtype in _HALVES and q.shape[-1] % 8 == 0 and (not causal or q.shape[2] == k.shape[2])


def _repeat(x: torch.Tensor, heads: int) -> torch.Tensor:
    """k or v with every head repeated for the query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _sum(x: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """The reverse of `_repeat` for gradients."""
    return x if x.shape[1] == heads_kv else x.unflatten(1, (heads_kv, -1)).sum(2)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    """`F.scaled_dot_product_attention`, grouped where the head counts differ."""
    grouped: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, **grouped)


def torch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _flash_applies(q, k, causal):
        return sdpa(q, k, v, causal, scale), eager.log_sum_exp(q.float(), k.float(), causal, scale)
    heads = q.shape[1]
    o, lse, *_ = _aten._scaled_dot_product_flash_attention(
        q, _repeat(k, heads), _repeat(v, heads), 0.0, causal, False, scale=scale
    )
    return o, lse


def torch_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not _flash_applies(q, k, causal):
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            dq, dk, dv = torch.autograd.grad(sdpa(q, k, v, causal, scale), (q, k, v), do)
        return dq, dk, dv
    heads, heads_kv = q.shape[1], k.shape[1]
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # not read: there is no dropout
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        do,
        q,
        _repeat(k, heads),
        _repeat(v, heads),
        o,
        lse,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        seed,
        seed,
        scale=scale,
    )
    return dq, _sum(dk, heads_kv), _sum(dv, heads_kv)
