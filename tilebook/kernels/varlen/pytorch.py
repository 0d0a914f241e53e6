"""Packed sequences in PyTorch's own functions, one after the other, differentiable by its autograd.

It reads the lengths, so on a GPU the host waits for it.
"""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.attention import pytorch as attention
from tilebook.kernels.attention.form import Form
from tilebook.kernels.varlen.eager import batched, sequences

Options = tuple[int, int, Form, float]


def plain(tensors: tuple[Any, ...], options: Options) -> torch.Tensor:
    """o (T, H, D) of q (T, H, D), k and v (Tk, Hkv, D); 0 behind the last sequence and where nothing is seen."""
    *packed, cu_q, cu_k = tensors
    # PyTorch's kernel for the CPU reads past tensors whose rows all lie in one place.
    q, k, v = (x.contiguous() if x.stride(0) == 0 else x for x in packed)
    _, _, form, scale = options
    o, parts = attention.nothing(q, k, v), {}
    for rows, columns, own in sequences(cu_q, cu_k, form):
        given = (batched(q, rows), batched(k, columns), batched(v, columns), None, None, None)
        parts[rows.start] = attention.plain(given, (own, scale))[0].transpose(0, 1)
    return _filled(o, parts, 0)


def _filled(empty: torch.Tensor, parts: dict[int, torch.Tensor], axis: int) -> torch.Tensor:
    """A tensor with parts of it replaced, by where they start. Not in place: under `vmap` they may have a batch."""
    if not parts:
        return empty
    pieces, at = [], 0
    for start, part in sorted(parts.items()):
        pieces += [empty.narrow(axis, at, start - at), part]
        at = start + part.shape[axis]
    return torch.cat([*pieces, empty.narrow(axis, at, empty.shape[axis] - at)], axis)


def log_sum_exp(tensors: tuple[Any, ...], options: Options) -> torch.Tensor:
    """The natural log-sum-exp of each row's scores, (H, T) in fp32, without gradient."""
    q, k, v, cu_q, cu_k = tensors
    _, _, form, scale = options
    lse, parts = torch.full(q.shape[1::-1], -torch.inf, dtype=torch.float32, device=q.device), {}
    for rows, columns, own in sequences(cu_q, cu_k, form):
        given = (batched(q, rows), batched(k, columns), batched(v, columns), None, None, None)
        parts[rows.start] = attention.log_sum_exp(given, (own, scale))[0]
    return _filled(lse, parts, 1)
