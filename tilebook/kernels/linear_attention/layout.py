"""How states lie in memory."""

from __future__ import annotations

import torch


def new_state(q: torch.Tensor, v: torch.Tensor, norm: bool) -> torch.Tensor:
    """A place for states (B, H, D, V), or V + 1, transposed in memory."""
    (batch, heads, _, width), columns = q.shape, v.shape[-1] + int(norm)
    steps = heads * width * columns, width * columns, 1, width
    return torch.empty_strided((batch, heads, width, columns), steps, dtype=torch.float32, device=q.device)
