"""A file of a model, as transformers writes them: attention that rotates its heads by a function beside it."""

import torch
from torch import nn

SCALE = 1.0


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)


ORIGINAL = apply_rotary_pos_emb


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, *, scale=None):
        q, k = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k))
        angles = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001] * 2)
        q, k = apply_rotary_pos_emb(q, k, angles.cos()[None].to(x.dtype), angles.sin()[None].to(x.dtype))
        return SCALE * (q @ k.mT @ k).transpose(1, 2).flatten(2)


def _backwards(q, k, cos, sin):
    return ORIGINAL(q, k, cos, -sin)


class Backwards(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return apply_rotary_pos_emb(x, x, x, x)


_namespace = {**globals(), "apply_rotary_pos_emb": _backwards}
Backwards.forward = type(Backwards.forward)(Backwards.forward.__code__, _namespace, "forward")
