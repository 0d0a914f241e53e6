"""Rotary position embedding in PyTorch's own functions, differentiable by its autograd: what runs where no kernel does.

The operations are those of transformers' `apply_rotary_pos_emb`, in their order.
"""

from __future__ import annotations

from typing import Any

import torch


def turned(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Every pair (a, b) of the last axis as (−b, a): by halves, or one beside the other."""
    if interleaved:  # whose gradients are put together by one kernel, as those of slices are not
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-second, first), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def joined(x: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """What was rotated of x, in its dtype, and the rest of x."""
    rotated, width = rotated.to(x.dtype), rotated.shape[-1]
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), -1)


def over_heads(angles: torch.Tensor) -> torch.Tensor:
    """cos or sin (S, R) or (B, S, R) beside (B, H, S, D)."""
    return angles.unsqueeze(-3)


def plain(tensors: tuple[Any, ...], options: tuple[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k after the rotation, for an entry's tensors (q, k, cos, sin) and options (interleaved,)."""
    q, k, cos, sin = tensors
    cos, sin = over_heads(cos), over_heads(sin)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        width = cos.shape[-1]
        part = x if width == x.shape[-1] else x[..., :width]  # whose gradient would be copied once more
        return joined(x, (part * cos) + (turned(part, options[0]) * sin))

    return rotated(q), rotated(k)
