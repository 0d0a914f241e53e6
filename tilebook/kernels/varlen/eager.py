"""Packed sequences in eager PyTorch, one after the other: the reference, and what serves where no kernel can.

It reads the lengths, so on a GPU the host waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tilebook.kernels.attention.form import Form, form, simplest

Outputs = tuple[torch.Tensor, ...]


def sequences(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, asked: Form
) -> Iterator[tuple[slice, slice, Form]]:
    """Rows of q, rows of k, and the form in its simplest terms, of each sequence that has both."""
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        rows, columns = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        n_q, n_k = (part.stop - part.start for part in (rows, columns))
        if n_q > 0 and n_k > 0:
            left, right, corner = simplest(n_q, n_k, asked.left, asked.right, asked.bottom_right)
            own = form(left=left, right=right, bottom_right=corner, softcap=asked.softcap, tf32=asked.tf32)
            yield rows, columns, own


def batched(x: torch.Tensor, part: slice) -> torch.Tensor:
    """(T, H, D) → (1, H, S, D)"""
    return x[part].transpose(0, 1)[None]


def forward(
    attend: Callable[..., Outputs],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o (T, H, D) and lse (H, T) by `attend(q, k, v, form, scale)`, which takes (B, H, S, D)."""
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[1::-1], -torch.inf, dtype=torch.float32, device=q.device)
    for rows, columns, own in sequences(cu_seqlens_q, cu_seqlens_k, form):
        o_part, lse_part = attend(batched(q, rows), batched(k, columns), batched(v, columns), own, scale)
        o[rows], lse[:, rows] = o_part[0].transpose(0, 1), lse_part[0]
    return o, lse


def backward(
    attend: Callable[..., Outputs],
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    form: Form,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv by `attend(do, q, k, v, o, lse, form, scale)`."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for rows, columns, own in sequences(cu_seqlens_q, cu_seqlens_k, form):
        parts = attend(
            batched(do, rows),
            batched(q, rows),
            batched(k, columns),
            batched(v, columns),
            batched(o, rows),
            lse[None, :, rows].contiguous(),  # FlashAttention-2 reads it by address, whatever its strides
            own,
            scale,
        )
        for out, at, part in zip((dq, dk, dv), (rows, columns, columns), parts, strict=True):
            out[at] = part[0].transpose(0, 1)
    return dq, dk, dv
