"""PyTorch's FlashAttention-2 for packed sequences, brought to the signature of our ops (GPU only)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tilebook.device import Device
from tilebook.kernels.attention.form import Form
from tilebook.kernels.varlen.problem import ForwardProblem
from tilebook.launch import launch
from tilebook.layout import aligned

_aten = torch.ops.aten
_ROWS, _COLUMNS = 64, 256


def available(device: Device) -> bool:
    return (
        device.backend == "cuda"
        and device.capability >= 80
        and torch.backends.cuda.is_built()
        and torch.backends.cuda.is_flash_attention_available()
    )


def supports(problem: ForwardProblem) -> bool:
    """Its diagonal ends in the last row and column."""
    return (
        problem.dtype in ("bf16", "fp16")
        and problem.head_dim % 8 == 0
        and problem.head_dim <= 256
        and problem.diagonal == "bottom_right"
        and not problem.softcap
    )


@triton.jit(do_not_specialize=["n_sequences", "total"])
def clear_rest(x, cu_seqlens, stride, n_sequences, total, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in those of ROWS rows of `x`, (total, WIDTH), that lie behind the last sequence."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    past = (rows >= tl.load(cu_seqlens + n_sequences)) & (rows < total)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        there = past[:, None] & (columns < WIDTH)[None, :]
        nothing = tl.zeros([ROWS, BLOCK], dtype=x.dtype.element_ty)
        tl.store(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], nothing, mask=there)


def _sides(form: Form) -> dict[str, Any]:
    return {"window_size_left": form.left, "window_size_right": form.right}


def _cleared(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """`x` with zeros behind the last sequence, where it wrote nothing."""
    x = x.contiguous()
    total, width = len(x), x.shape[1] * x.shape[2]
    launch(
        clear_rest,
        (triton.cdiv(total, _ROWS),),
        x,
        cu_seqlens,
        width,
        len(cu_seqlens) - 1,
        total,
        WIDTH=width,
        ROWS=_ROWS,
        BLOCK=_COLUMNS,
        num_warps=4,
    )
    return x


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = aligned(q), aligned(k), aligned(v)
    o, lse, *_ = _aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, form.causal, False, scale=scale, **_sides(form)
    )
    # Rows that see nothing have +inf there, and those behind the last sequence anything.
    past = torch.arange(len(q), device=q.device) >= cu_seqlens_q[-1]
    return _cleared(o, cu_seqlens_q), torch.where(past | (lse == torch.inf), -torch.inf, lse)


def backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # not read: there is no dropout
    do, q, k, v, o = (aligned(x) for x in (do, q, k, v, o))
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    dq, dk, dv = _aten._flash_attention_backward(
        do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, 0.0, form.causal, seed, seed,
        scale=scale, **_sides(form),
    )  # fmt: skip
    return _cleared(dq, cu_seqlens_q), _cleared(dk, cu_seqlens_k), _cleared(dv, cu_seqlens_k)
