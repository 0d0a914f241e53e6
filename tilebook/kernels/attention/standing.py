"""The ops that PyTorch's `scaled_dot_product_attention` runs on a GPU, for which ours stand, gradients apart.

Of one row, with which a model generates, they are PyTorch's: another length at every call is another problem, and to
ask about it takes the host 0.2 ms. `tilebook.attention_decode` is for such calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from tilebook import device as devices
from tilebook.kernels.attention.entry import registered
from tilebook.kernels.attention.form import form
from tilebook.kernels.attention.native import cudnn_first
from tilebook.kernels.attention.pytorch import BOUNDS
from tilebook.layout import rows
from tilebook.native import Standing
from tilebook.native.plans import Empty, Output, contiguous, like


def _own(q: torch.Tensor, cudnn: bool) -> bool:
    """Is this op the one that PyTorch's function prefers here? Who asks for another gets it."""
    return not q.is_cuda or cudnn == cudnn_first(devices.current(q.get_device()).arch)


def _posed(
    cudnn: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, more: Sequence[Any], causal: bool, scale: Any
) -> tuple[Any, ...] | None:
    """What a call on these, without mask and dropout, is to ours; `more` comes before the form and its scale."""
    if q.ndim != 4 or q.dtype not in (torch.bfloat16, torch.float16) or not (q.numel() and k.numel()):
        return None
    if not q.dtype == k.dtype == v.dtype or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        return None
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or (causal and q.shape[2] != k.shape[2]):
        return None
    factor = float(q.shape[-1] ** -0.5) if scale is None else scale
    if not 0 < factor < math.inf or not _own(q, cudnn):
        return None
    told = form(right=0 if causal else -1, deterministic=torch.are_deterministic_algorithms_enabled())
    return rows(q), rows(k), rows(v), *more, told, factor


def _forward(cudnn: bool, args: Sequence[Any]) -> tuple[Any, ...] | None:
    q, k, v, *rest = args
    bias, dropout, causal, debug, scale = (rest[0], *rest[2:]) if cudnn else (None, *rest)
    return None if bias is not None or dropout or debug else _posed(cudnn, q, k, v, (), causal, scale)


def _backward(cudnn: bool, args: Sequence[Any]) -> tuple[Any, ...] | None:
    do, q, k, v, o, lse, *rest = args
    bias, dropout, causal, scale = (rest[2], rest[7], rest[8], rest[9]) if cudnn else (None, rest[4], rest[5], rest[8])
    if bias is not None or dropout or not do.shape == o.shape == q.shape or not do.dtype == o.dtype == q.dtype:
        return None
    if lse is None or lse.dtype != torch.float32 or lse.numel() != q[..., 0].numel():
        return None
    found = _posed(cudnn, q, k, v, (rows(o), lse.reshape(q.shape[:3])), causal, scale)
    return None if found is None else (rows(do), *found)


def _made(cudnn: bool, args: Sequence[Any]) -> list[Output]:
    """(output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, two tensors of a dropout's seed, debug_attn_mask)"""
    q, k = args[:2]
    lengths = q.shape[2], k.shape[2]
    if cudnn:
        seed, wanted = Empty((), torch.int64), args[4]
        return [like(q), contiguous((*q.shape[:3], 1)) if wanted else None, None, None, *lengths, seed, seed, None]
    seeds = Empty((2,), torch.uint64), Empty((), torch.uint64)
    return [like(q), contiguous(q.shape[:3]), None, None, *lengths, *seeds, Empty((0,), q.dtype)]


def _gradients(args: Sequence[Any]) -> list[Output]:
    return [like(each) for each in args[1:4]]


def _long(pairs: float, first: int, args: Sequence[Any]) -> bool:
    q, k = args[first : first + 2]
    return bool(q.numel() * k.shape[2] > pairs)


def _op(direction: int) -> Any:
    return registered()[direction]


def _standings(name: str, cudnn: bool) -> tuple[Standing, Standing]:
    forward, backward = BOUNDS
    return (
        Standing(
            name, partial(_op, 0), partial(_forward, cudnn), (0, 1, 2, None, None), partial(_made, cudnn),
            partial(_long, forward, 0), of_rows=True,
        ),
        Standing(
            f"{name}_backward", partial(_op, 1), partial(_backward, cudnn), (0, 1, 2, 3, 4, 5, None, None), _gradients,
            partial(_long, backward, 1), of_rows=True,
        ),
    )  # fmt: skip


STANDINGS = (
    *_standings("aten::_scaled_dot_product_cudnn_attention", True),
    *_standings("aten::_scaled_dot_product_flash_attention", False),
)
