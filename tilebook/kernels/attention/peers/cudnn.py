"""cuDNN's kernels, as PyTorch has them."""

from __future__ import annotations

import functools

import torch

from tilebook.device import Device
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.kernels.attention.pytorch import in_vectors, scores
from tilebook.layout import VECTOR, aligned

_aten = torch.ops.aten

_NO_DROPOUT = -0.0
"""Up to version 2.11 PyTorch keeps cuDNN's graphs of the backward pass by the layouts of q, k and v alone, and repeats
one for gradients that lie otherwise, which gives wrong numbers. This zero is no dropout either, but has graphs of its
own: those of `backward`, whose o and do always lie as q does."""


def available(device: Device) -> bool:
    return device.capability >= 80 and torch.backends.cudnn.is_available()


def supports(problem: ForwardProblem | BackwardProblem) -> bool:
    return (
        problem.dtype in ("bf16", "fp16")
        and problem.head_dim <= 128
        and problem.head_dim % 8 == 0
        and problem.seq_k > 1
        and not problem.form.composed
        and problem.form.bias != "dbias"
        # Its causal mask is aligned to the other corner where the lengths differ.
        and (not problem.causal or problem.seq_q == problem.seq_k)
    )


def _table(q: torch.Tensor, k: torch.Tensor, form: Form, extras: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """What is added to the scores, in the dtype of q and broadcastable to (B, H, Sq, Sk)."""
    if not form.bias:
        return None
    bias, n_k = extras[0], k.shape[2]
    if form.bias != "mask" and bias.dtype != q.dtype:
        raise TypeError(f"cuDNN's attention takes biases of {q.dtype} here, not {bias.dtype}")
    return in_vectors(scores(bias, q.dtype), n_k, q.dtype)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    table = _table(q, k, form, extras)
    o, lse = _forward(q, k, v, form, scale, table)
    if table is not None:  # rows that see nothing are 0, but their log-sum-exp is not told
        lse = lse.masked_fill(table.amax(-1) == -torch.inf, -torch.inf)
    return o, lse


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, table: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    bias = None if table is None else table.expand(*q.shape[:3], k.shape[2])
    o, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, form.causal, False, scale=scale)
    return o, lse.view(q.shape[:-1])


def called(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float, *extras: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What PyTorch's own function runs: it does not say of rows that see nothing that they do not."""
    return _forward(q, k, v, form, scale, _table(q, k, form, extras))


@functools.lru_cache(4096)
def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of what cuDNN's forward pass makes of a q with these strides: the same order of axes, without gaps."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def _as_made(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`x`, laid out as the forward pass lays out o."""
    strides, given = _strides(q.shape, q.stride()), x.stride()
    if not x.data_ptr() % VECTOR:
        if given == strides:
            return x
        if all(a == b or n == 1 for a, b, n in zip(given, strides, x.shape, strict=True)):
            return x.as_strided(x.shape, strides)
    return torch.empty_strided(q.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if form.bias:  # exp(-inf - inf) of their weights: no row that sees nothing has a part in a gradient
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return called_backward(do, q, k, v, o, lse, form, scale, *extras)


def called_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
    *extras: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the gradient of PyTorch's own function runs, whose forward pass has no row that sees nothing."""
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # not read: there is no dropout
    lengths = q.shape[2], k.shape[2]
    q, k, v = aligned(q), aligned(k), aligned(v)
    do, o = _as_made(do, q), _as_made(o, q)
    table = _table(q, k, form, extras)
    if table is not None:
        table = table.expand(*q.shape[:3], k.shape[2])
    lse = lse.contiguous()[..., None]
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        do,
        q,
        k,
        v,
        o,
        lse,
        seed,
        seed,
        table,
        None,
        None,
        *lengths,
        _NO_DROPOUT,
        form.causal,
        scale=scale,
    )
    return dq, dk, dv


attention_fwd.implementation("cudnn", available=available, supports=supports, timed=called)(forward)
attention_bwd.implementation(
    "cudnn", available=available, supports=supports, deterministic=False, timed=called_backward
)(backward)
