"""mLSTM's memory in PyTorch's own functions, by chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook.kernels.linear_attention.pytorch import LEAST, behind, between
from tilebook.torch_ops import recording

_CHUNK = 64


def chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, log_input: torch.Tensor, floor: torch.Tensor,
    state: torch.Tensor | None, scale: float, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, the last state and each row's sum of weights: products in the dtype of q, sums in fp32.

    state: (B, H, D, V + 1), of which the last column is that of a column of v that is 1 throughout. o is divided by
    eps + max(|sum|, floor).
    """
    rows, state, den = summed(q, k, v, g, log_input, state, scale)
    divisor = torch.maximum(den.abs(), floor.to(den.dtype)) + eps
    return (rows / divisor[..., None]).to(v.dtype), state, den


def summed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, log_input: torch.Tensor,
    state: torch.Tensor | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same before outputs are divided, in fp32."""
    n, products, columns = q.shape[2], q.dtype, v.shape[3]
    wide = torch.promote_types(products, torch.float32)
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[3], columns + 1, dtype=wide, device=q.device)
    state = state.to(wide)
    if not v.numel():
        return v.to(wide), state, q.new_zeros(q.shape[:3], dtype=wide)
    count, short = -(-n // _CHUNK), -n % _CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (count, _CHUNK)) for x in (q, k, v))
    written = F.pad(log_input.to(wide), (0, short)).unflatten(2, (count, _CHUNK))
    steps = F.pad(g.to(wide).clamp(min=LEAST), (0, short)).unflatten(2, (count, _CHUNK))
    c = steps.cumsum(-1)
    rest = (behind(steps) + written).exp()[..., None]
    weights = (q @ k.mT).to(wide) * between(c)
    weights = (weights * written.exp()[..., None, :]).to(products)
    inside, sums = (weights @ v).to(wide), weights.sum(-1, dtype=wide)
    leaving = k.to(wide) * rest
    asking, kept = c.exp(), c[..., -1].exp()[..., None, None]
    rows, totals = [], []
    for i in range(count):
        old = (q[:, :, i] @ state[..., :columns].to(products)).to(wide)
        rows.append(inside[:, :, i] + old * asking[:, :, i, :, None])
        known = (q[:, :, i].to(wide) * state[:, :, None, :, columns]).sum(-1)
        totals.append(sums[:, :, i] + known * asking[:, :, i])
        grown = (leaving[:, :, i].to(products).mT @ v[:, :, i]).to(wide)
        state = state * kept[:, :, i] + torch.cat((grown, leaving[:, :, i].sum(-2)[..., None]), -1)
    return torch.cat(rows, 2)[:, :, :n] * scale, state, torch.cat(totals, 2)[:, :, :n] * scale


def plain(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, state) for an entry's tensors and options."""
    return chunked(*tensors, *options)[:2]


def gradients(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    log_input: torch.Tensor, state: torch.Tensor | None, weight: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Those of `summed`, by autograd: `do` of its rows, `weight` of its sums. Nothing of a state that is not there."""
    with recording():
        apart: list[Any] = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, g, log_input, state)]
        q, k, v, g, log_input, state = apart
        rows, last, den = summed(q, k, v, g, log_input, state, scale)
        ends, starts = (rows, den), (do.to(rows.dtype), weight.to(den.dtype))
        if dstate is not None:
            ends, starts = (*ends, last), (*starts, dstate.to(last.dtype))  # type: ignore[assignment]
        found = iter(torch.autograd.grad(ends, [x for x in apart if x is not None], starts))
    return tuple(last.new_empty(0) if x is None else next(found) for x in apart)
