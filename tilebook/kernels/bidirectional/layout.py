"""How outputs and states lie in memory."""

from __future__ import annotations

import torch


def outputs(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A place for o (B, H, S, V), in the order of axes of v."""
    (batch, heads, n, _), columns = q.shape, v.shape[-1]
    if v.stride(1) < v.stride(2):
        return v.new_empty(batch, n, heads, columns).transpose(1, 2)
    return v.new_empty(batch, heads, n, columns)


def new_state(q: torch.Tensor, columns: int, features: int, parts: int = 1) -> torch.Tensor:
    """A place for states (B, H, V + 2, F), so many of each head, one below the other."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], parts * (columns + 2), features, dtype=wide)


def empty(q: torch.Tensor, v: torch.Tensor, features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty outputs of a call: o, the state, den (B, H, S)."""
    state = new_state(q, v.shape[-1], features)
    return outputs(q, v), state, state.new_empty(q.shape[:3])
