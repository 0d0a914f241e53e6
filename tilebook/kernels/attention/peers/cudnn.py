"""cuDNN's kernels, as PyTorch has them."""

from __future__ import annotations

import torch

from tilebook.device import Device
from tilebook.kernels.attention.form import Form
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.problem import BackwardProblem, ForwardProblem
from tilebook.layout import aligned

_aten = torch.ops.aten


def available(device: Device) -> bool:
    return device.capability >= 80 and torch.backends.cudnn.is_available()


def supports(problem: ForwardProblem | BackwardProblem) -> bool:
    return (
        problem.dtype in ("bf16", "fp16")
        and problem.head_dim <= 128
        and problem.head_dim % 8 == 0
        and problem.seq_k > 1
        # Biases it would take too, but a row that they hide altogether comes out as NaN.
        and problem.form.plain
        # Its causal mask is aligned to the other corner where the lengths differ.
        and (not problem.causal or problem.seq_q == problem.seq_k)
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: Form, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    o, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, form.causal, False, scale=scale)
    return o, lse.view(q.shape[:-1])


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # not read: there is no dropout
    lengths = q.shape[2], k.shape[2]
    do, q, k, v, o = (aligned(x) for x in (do, q, k, v, o))
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
        None,
        None,
        None,
        *lengths,
        0.0,
        form.causal,
        scale=scale,
    )
    return dq, dk, dv


attention_fwd.implementation("cudnn", available=available, supports=supports)(forward)
attention_bwd.implementation("cudnn", available=available, supports=supports, deterministic=False)(backward)
