"""Linear attention with decays by channel in PyTorch's own functions, by chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook.kernels.linear_attention.pytorch import LEAST, behind
from tilebook.torch_ops import recording

_CHUNK = 64


def _pairs(q: torch.Tensor, k: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Σ_d q_id k_jd exp(c_id − c_jd) for j ≤ i of chunks (…, C, D), else 0: (…, C, C), see `kernels`."""
    wide, r = c.dtype, torch.arange(_CHUNK, device=c.device)
    found = torch.diag_embed((q.to(wide) * k.to(wide)).sum(-1))
    for level in range(_CHUNK.bit_length() - 1):
        half = 1 << level
        blocks = c.unflatten(-2, (-1, 2 * half))
        late = (r[: 2 * half, None] >= half).to(wide) * 2 - 1
        part = ((blocks - blocks[..., half - 1 : half, :]) * late).exp().flatten(-3, -2)
        weights = ((q * part).to(q.dtype) @ (k * part).to(k.dtype).mT).to(wide)
        later = (((r[:, None] ^ r[None, :]) >> level) == 1) & (r[:, None] > r[None, :])
        found = found + weights.masked_fill(~later, 0)
    return found


def chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the last state: products in the dtype of q, sums in fp32."""
    n, products = q.shape[2], q.dtype
    wide = torch.promote_types(products, torch.float32)
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide, device=q.device)
    state = state.to(wide)
    if not v.numel():
        return v * 1, state
    count, short = -(-n // _CHUNK), -n % _CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (count, _CHUNK)) for x in (q, k, v))
    steps = F.pad(g.to(wide).clamp(min=LEAST), (0, 0, 0, short)).unflatten(2, (count, _CHUNK))
    c = steps.cumsum(-2)
    scores = (_pairs(q, k, c) * scale).to(products)
    asking, leaving = (q * (c.exp() * scale)).to(products), (k * behind(steps, -2).exp()).to(products)
    kept, inside = c[..., -1, :].exp()[..., None], (scores @ v).to(wide)
    outputs = []
    for i in range(count):
        outputs.append(inside[:, :, i] + (asking[:, :, i] @ state.to(products)).to(wide))
        state = state * kept[:, :, i] + (leaving[:, :, i].mT @ v[:, :, i]).to(wide)
    return torch.cat(outputs, 2)[:, :, :n].to(products), state


def plain(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, state) for an entry's tensors and options."""
    return chunked(*tensors, *options)


def gradients(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
    state: torch.Tensor | None, scale: float, decayed: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Those of `chunked`, by autograd; of what is not there or not wanted, nothing."""
    with recording():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        g = g.detach().requires_grad_(decayed)
        state = state if state is None else state.detach().requires_grad_()
        o, last = chunked(q, k, v, g, state, scale)
        ends, starts = ((o,), (do,)) if dstate is None else ((o, last), (do, dstate.to(last.dtype)))
        wanted = [x for x in (q, k, v, g, state) if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(ends, wanted, starts))
    dq, dk, dv = (next(found) for _ in range(3))
    nothing = o.new_empty(0, dtype=last.dtype)
    return dq, dk, dv, next(found) if decayed else nothing, nothing if state is None else next(found)
