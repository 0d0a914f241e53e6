"""Attention as its formula, and small tensors for it."""

import math

import torch


def reference(q, k, v, seen, *, scale=None, softcap=0.0, bias=None, sinks=None):
    """Spelled out in fp64: (B, Sq, H, Dv)."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias.double()
    scores = scores.masked_fill(~seen, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    if sinks is not None:
        more = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.softmax(torch.cat([scores, more], -1), -1)[..., :-1] @ v).transpose(1, 2)
    return (torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0) @ v).transpose(1, 2)


def drawn(n_q=12, n_k=12, heads=(4, 2), width=16, v_width=None, batch=2):
    torch.manual_seed(0)
    shapes = (heads[0], n_q, width), (heads[1], n_k, width), (heads[1], n_k, v_width or width)
    return [torch.randn(batch, *shape).requires_grad_() for shape in shapes]


def tril(n_q, n_k):
    return torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
