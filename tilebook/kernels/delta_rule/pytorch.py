"""The gated delta rule in PyTorch's own functions: by chunks, and token by token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook.kernels.linear_attention.pytorch import LEAST, behind, between
from tilebook.torch_ops import recording

EPS = 1e-6
"""What is added to the squared length of a row before it is divided by its length."""

_CHUNK = 64


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, in the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor,
    state: torch.Tensor | None, scale: float, normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """o and the last state: products in the dtype of q, sums and the solution of each chunk's equations in fp32.

    With c the sums of a chunk's log-decays and h the state before it, what its tokens add are the rows of
    (I + A)⁻¹ β (v − e^c k h), A_ij = β_i e^(c_i − c_j) k_i · k_j for j < i (Yang et al., 2024, §3.3).
    """
    n, products = q.shape[2], q.dtype
    wide = torch.promote_types(products, torch.float32)
    if normalize:
        q, k = unit(q), unit(k)
    if state is None:
        state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide, device=q.device)
    state = state.to(wide)
    if not v.numel():
        return v * 1, state
    count, short = -(-n // _CHUNK), -n % _CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (count, _CHUNK)) for x in (q, k, v))
    rate = F.pad(beta.to(wide), (0, short)).unflatten(2, (count, _CHUNK))[..., None]
    steps = (
        torch.zeros_like(rate[..., 0])
        if g is None
        else F.pad(g.to(wide).clamp(min=LEAST), (0, short)).view(rate.shape[:-1])
    )
    c = steps.cumsum(-1)
    apart = between(c)
    a = ((k @ k.mT).to(wide) * apart * rate).tril(-1)
    eye = torch.eye(_CHUNK, dtype=wide, device=q.device).expand_as(a)
    inverse = torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True).to(products)
    own = inverse @ (v.to(wide) * rate).to(products)
    known = inverse @ (k.to(wide) * (rate * c.exp()[..., None])).to(products)
    scores = ((q @ k.mT).to(wide) * apart).to(products)
    asking, kept = c.exp()[..., None], c[..., -1].exp()[..., None, None]
    leaving = (k.to(wide) * behind(steps).exp()[..., None]).to(products)
    outputs = []
    for i in range(count):
        old = state.to(products)
        new = own[:, :, i].to(wide) - (known[:, :, i] @ old).to(wide)
        inter = (q[:, :, i] @ old).to(wide) * asking[:, :, i]
        outputs.append(inter + (scores[:, :, i] @ new.to(products)).to(wide))
        state = state * kept[:, :, i] + (leaving[:, :, i].mT @ new.to(products)).to(wide)
    return (torch.cat(outputs, 2)[:, :, :n] * scale).to(products), state


def plain(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, state) for an entry's tensors and options."""
    return chunked(*tensors, *options)


def gradients(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor | None, scale: float, normalize: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Those of `chunked`, by autograd; of what is not there, nothing."""
    with recording():
        apart: list[Any] = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, g, beta, state)]
        q, k, v, g, beta, state = apart
        o, last = chunked(q, k, v, g, beta, state, scale, normalize)
        ends, starts = ((o,), (do,)) if dstate is None else ((o, last), (do, dstate.to(last.dtype)))
        wanted = [x for x in apart if x is not None]
        grads = iter(torch.autograd.grad(ends, wanted, starts, materialize_grads=True))
    nothing = last.new_empty(0)
    return tuple(nothing if x is None else next(grads) for x in apart)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor,
    scale: float, normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o, state) of one token: q, k (B, H, D), v (B, H, V), state (B, H, D, V), g and beta (B, H)."""
    if normalize:
        q, k = unit(q), unit(k)
    keys, queries = (x[..., None, :].to(state.dtype) for x in (k, q))
    if g is not None:
        state = state * g.to(state.dtype).clamp(min=LEAST).exp()[..., None, None]
    wrong = (v.to(state.dtype) - (keys @ state).squeeze(-2)) * beta.to(state.dtype)[..., None]
    state = state + keys.mT * wrong[..., None, :]
    return ((queries @ state).squeeze(-2) * scale).to(v.dtype), state
