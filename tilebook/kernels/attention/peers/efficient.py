"""PyTorch's memory-efficient kernels (CUTLASS, from xFormers), brought to the signature of our ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilebook.device import Device
from tilebook.kernels.attention.form import Form, banded
from tilebook.kernels.attention.layout import like
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.peers.heads import repeat_heads, sum_heads
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.op import DTYPES

_aten = torch.ops.aten

_ALIGNMENT = 16
"""Bytes: where tensors start and what their strides are multiples of."""

_BLOCK = 32
"""Its log-sum-exps are padded to a multiple of this many rows."""

_HIDDEN = torch.finfo(torch.float32).min / 1.4426950408889634
"""Scores below this are -inf in its base-2 exponentials, even where they are finite."""


def available(device: Device) -> bool:
    return device.backend == "cuda" and device.capability >= 80


def supports(problem: ForwardProblem | BackwardProblem) -> bool:
    """Full and causal top-left, biases and masks; fp32 as three products of tf32, which is nearly all of its accuracy.

    Head counts and batches are axes of its grid.
    """
    form = problem.form
    more = banded(form) or form.softcap or form.alibi or form.dropout
    small = max(problem.batch, problem.heads) < 1 << 16
    return not more and problem.dtype in DTYPES and problem.head_dim % 8 == 0 and small


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only where its kernels could not load whole vectors of it."""
    steps = all(step * x.itemsize % _ALIGNMENT == 0 for step, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1)
    there = x.device.type == "meta" or x.data_ptr() % _ALIGNMENT == 0
    if x.stride(-1) == 1 and steps and there:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _table(q: torch.Tensor, k: torch.Tensor, form: Form, extras: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """What is added to the scores, in the dtype of q and broadcastable to (B, H, Sq, Sk), its last axis Sk long.

    A causal mask becomes part of it: of tiles that its own causal mask skips, the gradient would not be written.
    Raises TypeError where a bias would have to be rounded.
    """
    if not form.bias:
        return None
    bias, n_q, n_k = extras[0], q.shape[2], k.shape[2]
    if form.bias != "mask" and bias.dtype != q.dtype:
        raise TypeError(f"PyTorch's memory-efficient attention takes biases of {q.dtype} here, not {bias.dtype}")
    if form.bias != "mask" and not form.causal and bias.shape[3] == n_k and _aligned(bias) is bias:
        return bias
    rows, row = n_q if form.causal else bias.shape[2], -(-n_k // _ALIGNMENT) * _ALIGNMENT
    table = torch.empty((*bias.shape[:2], rows, row), dtype=q.dtype, device=q.device)[..., :n_k]
    if form.bias == "mask":
        table.zero_().masked_fill_(~bias, -torch.inf)
    else:
        table.copy_(bias)
    if form.causal:
        columns = torch.arange(n_k, device=q.device)
        table.masked_fill_(columns > torch.arange(n_q, device=q.device)[:, None], -torch.inf)
    return table


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    table = _table(q, k, form, extras)
    bias = None if table is None else table.expand(batch, heads, n_q, n_k)
    causal = form.causal and bias is None
    o, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        q, repeat_heads(k, heads), repeat_heads(v, heads), bias, True, 0.0, causal, scale=scale
    )
    lse = lse[..., :n_q].contiguous()
    if table is not None:  # of rows that see nothing it says 0
        lse = lse.masked_fill(table.amax(-1).float() < _HIDDEN, -torch.inf)
    placed = o.transpose(1, 2).is_contiguous() and not q.transpose(1, 2).is_contiguous()
    return like(q).copy_(o) if placed else o, lse


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *extras: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Adds up dq by atomics where it splits the keys."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    (batch, heads, n_q, _), (heads_kv, n_k) = q.shape, k.shape[1:3]
    table = _table(q, k, form, extras)
    bias = None if table is None else table.expand(batch, heads, n_q, n_k)
    # It takes o to lie as its own forward leaves it. Weights of rows that see nothing are exp(-inf - inf) = 0.
    o = o.transpose(1, 2).contiguous().transpose(1, 2)
    lse = F.pad(lse.masked_fill(lse < _HIDDEN, torch.inf), (0, -n_q % _BLOCK), value=torch.inf)
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # not read: there is no dropout
    wanted = form.bias == "dbias"
    dq, dk, dv, dbias = _aten._scaled_dot_product_efficient_attention_backward(
        do,
        q,
        repeat_heads(k, heads),
        repeat_heads(v, heads),
        bias,
        o,
        lse,
        seed,
        seed,
        0.0,
        [True, True, True, wanted],
        form.causal and bias is None,
        scale=scale,
    )
    found = dq, sum_heads(dk, heads_kv), sum_heads(dv, heads_kv)
    if not wanted:
        return found
    across = [axis for axis, (n, size) in enumerate(zip(extras[0].shape, dbias.shape, strict=True)) if n != size]
    return *found, dbias.sum(across, keepdim=True) if across else dbias


attention_fwd.implementation("mem_efficient", available=available, supports=supports)(forward)
attention_bwd.implementation("mem_efficient", available=available, supports=supports, deterministic=False)(backward)
