"""Ways to compute CCT's layers: PyTorch's, tilebook's, and wrong ones that a fused implementation may well have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from small_models import PYTORCH, Functions
from torch import nn

import tilebook


@dataclass(frozen=True)
class Way:
    """How a model is trained, and asked.

    on: with `tilebook.enabled()`. dtype: of autocast. scaled: the loss of fp16. weights: their dtype.
    drops: attention drops weights in evaluation, too.
    """

    use: Functions
    on: bool = False
    dtype: torch.dtype | None = None
    scaled: bool = True
    weights: torch.dtype = torch.float32
    drops: bool = False


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, factor: float | None = None
) -> torch.Tensor:
    """As the authors' program has it: the whole matrix of scores, its softmax, dropout."""
    weights = (q @ k.mT * (q.shape[-1] ** -0.5 if factor is None else factor)).softmax(-1)
    return F.dropout(weights, dropout_p) @ v


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


def _ours(x: torch.Tensor, up: nn.Linear, down: nn.Linear) -> torch.Tensor:
    return tilebook.mlp(x, up.weight, up.bias, down.weight, down.bias)


PLAIN = replace(PYTORCH, attention=written_out)

WAYS = {
    "pytorch": Way(PLAIN),
    "sdpa": Way(replace(PLAIN, attention=_sdpa)),
    "attention": Way(replace(PLAIN, attention=tilebook.attention)),
    "mlp": Way(replace(PLAIN, mlp=_ours)),
    "attention + mlp": Way(replace(PLAIN, attention=tilebook.attention, mlp=_ours)),
    "TILEBOOK=1": Way(replace(PLAIN, attention=_sdpa), on=True),
}
"""The authors' program first; `sdpa` is the same with PyTorch's fused attention."""


def _attention(change: Any) -> Way:
    return Way(replace(PLAIN, attention=change))


def _mlp(change: Any) -> Way:
    return Way(replace(PLAIN, mlp=change))


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    return written_out(q, *(F.pad(x, (0, 0, 0, 64)) for x in (k, v)), dropout_p)


def _mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    batch, heads, tokens, width = q.shape
    return written_out(q, k, v, dropout_p).reshape(batch, tokens, heads, width).transpose(1, 2)


def _twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0) -> torch.Tensor:
    return F.dropout(written_out(q, k, v, dropout_p), dropout_p)


def _relus_gradient(x: torch.Tensor, up: nn.Linear, down: nn.Linear) -> torch.Tensor:
    z = up(x)
    through = F.relu(z)
    return down(F.gelu(z).detach() + through - through.detach())


def _no_weights(x: torch.Tensor, up: nn.Linear, down: nn.Linear) -> torch.Tensor:
    w1, b1, w2, b2 = (each.detach() for layer in (up, down) for each in (layer.weight, layer.bias))
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


FAULTS = {
    "the scale left out": _attention(lambda q, k, v, dropout_p=0.0: written_out(q, k, v, dropout_p, 1.0)),
    "the scale applied twice": _attention(
        lambda q, k, v, dropout_p=0.0: written_out(q, k, v, dropout_p, 1 / q.shape[-1])
    ),
    "heads and tokens mixed up": _attention(_mixed),
    "64 rows of padding seen as keys": _attention(_padded),
    "softmax over the queries": _attention(
        lambda q, k, v, dropout_p=0.0: F.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-2), dropout_p) @ v
    ),
    "dropout applied twice": _attention(_twice),
    "dropout without its factor": _attention(
        lambda q, k, v, dropout_p=0.0: written_out(q, k, v, dropout_p) * (1 - dropout_p)
    ),
    "dropout in evaluation": Way(PLAIN, drops=True),
    "no gradient through attention": _attention(
        lambda q, k, v, dropout_p=0.0: written_out(q, k, v, dropout_p).detach()
    ),
    "no gradient of q and k": _attention(
        lambda q, k, v, dropout_p=0.0: written_out(q.detach(), k.detach(), v, dropout_p)
    ),
    "tanh GELU": _mlp(lambda x, up, down: down(F.gelu(up(x), approximate="tanh"))),
    "ReLU's gradient for GELU's": _mlp(_relus_gradient),
    "the first bias after GELU": _mlp(lambda x, up, down: down(F.gelu(F.linear(x, up.weight)) + up.bias)),
    "no gradient of the MLP's weights": _mlp(_no_weights),
    "fp16, its loss scaled": Way(PLAIN, dtype=torch.float16),
    "fp16, its loss not scaled": Way(PLAIN, dtype=torch.float16, scaled=False),
    "tanh GELU and fp16, its loss not scaled": Way(
        _mlp(lambda x, up, down: down(F.gelu(up(x), approximate="tanh"))).use, dtype=torch.float16, scaled=False
    ),
    "weights in bf16": Way(PLAIN, weights=torch.bfloat16),
}
"""Each is the authors' program but for what its name says."""
