"""Feature maps φ: linear attention counts φ(q) · φ(k) where attention has exp(q · k)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

FeatureMap = Callable[[torch.Tensor], torch.Tensor]

NAMED: dict[str, FeatureMap] = {
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softmax": lambda x: x.softmax(-1),
}


def mapped(q: torch.Tensor, k: torch.Tensor, feature_map: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """φ(q) and φ(k). Raises ValueError for a name that is none."""
    if feature_map is None:
        return q, k
    if feature_map == "performer":
        return performer(q, k)
    found = NAMED.get(feature_map) if isinstance(feature_map, str) else feature_map
    if not callable(found):
        names = ", ".join(map(repr, (*NAMED, "performer")))
        raise ValueError(f"feature_map must be {names}, None or a function, not {feature_map!r}")
    return found(q), found(k)


@functools.lru_cache(maxsize=64)
def projection(width: int, features: int, seed: int) -> torch.Tensor:
    """(features, D) in fp64: rows of length √χ²(D), orthogonal in groups of D (Choromanski et al., 2021, §2.4)."""
    source = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(features / width)):
        square = torch.randn(width, width, generator=source, dtype=torch.float64)
        blocks.append(torch.linalg.qr(square)[0].T)
    lengths = torch.randn(features, width, generator=source, dtype=torch.float64).norm(dim=1)
    found: torch.Tensor = torch.cat(blocks)[:features] * lengths[:, None]
    return found


def performer(
    q: torch.Tensor, k: torch.Tensor, *, features: int = 64, seed: int = 0, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FAVOR+: positive features with E[φ(q) · φ(k)] ∝ exp(scale · q · k) (Choromanski et al., 2021, lemma 1).

    What they are multiplied by, of each row of q and of all of k, cancels where outputs are normalized.
    """
    root = (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    omega = projection(q.shape[-1], features, seed).to(q.device, torch.float32)

    def logarithms(x: torch.Tensor) -> torch.Tensor:
        x = x.float() * root
        return x @ omega.T - x.square().sum(-1, keepdim=True) / 2

    rows, columns = logarithms(q), logarithms(k)
    top = columns.detach().amax((-2, -1), keepdim=True) if columns.numel() else 0.0
    made = (rows - rows.detach().amax(-1, keepdim=True)).exp(), (columns - top).exp()
    return made[0].to(q.dtype), made[1].to(k.dtype)
