"""Linear attention in PyTorch's own functions: by chunks, and token by token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tilebook.kernels.bidirectional.features import NAMED
from tilebook.torch_ops import recording

LEAST = -100.0
"""Log-decays below count as this."""

_CHUNKS = ((4096, 64), (16384, 128))
_LONG = 256


def behind(steps: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Sums of a chunk's log-decays behind each token, from its end on. A difference of sums, or a sum less its last
    number, would be their rounding, and of gradients likewise."""
    later = torch.cat((steps.narrow(dim, 1, steps.shape[dim] - 1), torch.zeros_like(steps.narrow(dim, 0, 1))), dim)
    return later.flip(dim).cumsum(dim).flip(dim)


def between(c: torch.Tensor) -> torch.Tensor:
    """exp(c_i − c_j) of tokens j < i, (…, n) → (…, n, n); 1 where they are one, with no gradient, else 0."""
    n = c.shape[-1]
    earlier = torch.ones(n, n, dtype=torch.bool, device=c.device).tril(-1)
    apart = (c[..., :, None] - c[..., None, :]).masked_fill(~earlier, -torch.inf)
    return apart.masked_fill(torch.eye(n, dtype=torch.bool, device=c.device), 0.0).exp()


def chunked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, state: torch.Tensor | None,
    scale: float, normalize: bool, eps: float, feature_map: str = "none",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o, the last state and each row's divisor (nothing if not `normalize`): products in the dtype of q, sums in fp32.

    All chunks at once; states pass from chunk to chunk by one product with a matrix of decays (Dao & Gu, 2024, §6).
    """
    if feature_map != "none":
        q, k = (NAMED[feature_map](x).to(x.dtype) for x in (q, k))  # autocast would have some in fp32
    (batch, heads, n, width), columns = q.shape, v.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = torch.zeros(batch, heads, width, columns + int(normalize), dtype=wide, device=q.device)
    size = next((chunk for longest, chunk in _CHUNKS if n <= longest), _LONG)
    size = min(size, max(n, 1))
    count, short = -(-n // size), -n % size
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (count, size)) for x in (q, k, v))
    a = (q @ k.mT).to(wide)
    if g is None:
        a, leaving, within, passed = a.tril(), k, None, None
    else:
        steps = F.pad(g.to(wide).clamp(min=LEAST), (0, short)).unflatten(2, (count, size))
        c = steps.cumsum(-1)
        a = a * between(c)
        leaving, within = (k.to(wide) * behind(steps).exp()[..., None]).to(k.dtype), c.exp()[..., None]
        # Summed from each chunk's end on: a difference of sums over all of the sequence is their rounding.
        ends = F.pad(c[..., -1], (1, 0))[..., :, None].expand(*c.shape[:2], count + 1, count + 1)
        apart = torch.ones(count + 1, count + 1, dtype=torch.bool, device=q.device).tril()
        passed = ends.masked_fill(~apart.tril(-1), 0).cumsum(-2).masked_fill(~apart, -torch.inf).exp()
    grown = (leaving.mT @ v).to(wide)
    if normalize:
        grown = torch.cat((grown, leaving.sum(-2, dtype=wide)[..., None]), -1)
    states = torch.cat((state.to(wide)[:, :, None], grown), 2)
    states = states.cumsum(2) if passed is None else (passed @ states.flatten(3)).view(states.shape)
    before, last = states[:, :, :-1], states[:, :, -1]
    old = (q @ before[..., :columns].to(q.dtype)).to(wide)
    o = (a.to(v.dtype) @ v).to(wide) + (old if within is None else old * within)
    den = o.new_empty(0)
    if normalize:
        known = (q.to(wide) * before[..., None, :, columns]).sum(-1, keepdim=True)
        den = (a.sum(-1, keepdim=True) + (known if within is None else known * within)) * scale
        o = o / (den + eps)
        den = den.flatten(2, 4)[:, :, :n]
    return (o * scale).flatten(2, 3)[:, :, :n].to(v.dtype), last, den


def plain(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, state) for an entry's tensors and options."""
    return chunked(*tensors, *options)[:2]


def gradients(
    do: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    g: torch.Tensor | None, state: torch.Tensor | None, weight: torch.Tensor | None, scale: float, decayed: bool,
    feature_map: str = "none",
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Those of `chunked`, by autograd; of what is not there or not wanted, nothing.

    weight: the gradient of what a column of v that is 1 throughout would give, or None.
    """
    if weight is not None:
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        do = torch.cat((do, weight[..., None].to(do.dtype)), -1)
    wanted = [q, k, v, *([g] if g is not None and decayed else []), *([state] if state is not None else [])]
    with recording():
        apart = [x.detach().requires_grad_() for x in wanted]
        found = iter(apart)
        q, k, v = (next(found) for _ in range(3))
        g = next(found) if g is not None and decayed else g
        state = next(found) if state is not None else None
        o, last, _ = chunked(q, k, v, g, state, scale, False, 0.0, feature_map)
        ends, starts = ((o,), (do,)) if dstate is None else ((o, last), (do, dstate.to(last.dtype)))
        grads = iter(torch.autograd.grad(ends, apart, starts))
    dq, dk, dv = (next(grads) for _ in range(3))
    nothing = o.new_empty(0, dtype=last.dtype)
    dg = next(grads) if g is not None and decayed else nothing
    dv = dv if weight is None else dv[..., :-1].contiguous()
    return dq, dk, dv, dg, next(grads) if state is not None else nothing


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, g: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, state) of one token: q, k (B, H, D), v (B, H, V), state (B, H, D, V), g (B, H) or (B, H, D)."""
    if g is not None:
        kept = g.clamp(min=LEAST).exp()[..., None]
        state = state * (kept if g.ndim == 3 else kept[..., None])
    query, key, value = (x.to(state.dtype) for x in (q, k, v))
    state = torch.addcmul(state, key[..., None], value[..., None, :])
    heads = state.shape[0] * state.shape[1]
    o = torch.bmm(query.reshape(heads, 1, q.shape[-1]), state.reshape(heads, *state.shape[2:])).view(v.shape) * scale
    return o.to(v.dtype), state
