"""What calls of several families of linear attention do with decays and states before anything runs."""

from __future__ import annotations

from typing import Any

import torch


def forgetting(q: torch.Tensor, log_decay: torch.Tensor | None, ends: torch.Tensor, states: bool) -> torch.Tensor:
    """Log-decays that forget all at the beginning of every packed sequence. Raises ValueError.

    ends: `cu_seqlens`. states: are there states in the call, which packed sequences cannot have?
    """
    if states:
        raise ValueError("cu_seqlens goes with neither initial_state nor return_state")
    kinds = torch.int32, torch.int64
    if q.ndim != 4 or q.shape[0] != 1 or ends.ndim != 1 or ends.dtype not in kinds or ends.device != q.device:
        got = f"{ends.dtype} {tuple(ends.shape)} on {ends.device} for q {tuple(q.shape)}"
        raise ValueError(
            f"cu_seqlens must be (N + 1,) integers of int32 or int64 beside q, whose batch is 1; got {got}"
        )
    n = q.shape[2]
    at = ends[:-1].long().clamp(0, n)
    if log_decay is None:  # the same for all heads
        decays = q.new_zeros(n + 1, dtype=torch.promote_types(q.dtype, torch.float32))
        return decays.index_fill_(0, at, -torch.inf)[:n].expand(q.shape[:3])
    begins = torch.zeros(n + 1, dtype=torch.bool, device=q.device).index_fill_(0, at, True)[:n]
    return log_decay.masked_fill(begins if log_decay.ndim < 4 else begins[:, None], -torch.inf)


def wide(x: torch.Tensor | None, q: torch.Tensor) -> Any:
    """Decays and states in fp32, beside fp64 in fp64."""
    return x if x is None else x.to(torch.promote_types(q.dtype, torch.float32))
