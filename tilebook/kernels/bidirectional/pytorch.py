"""Linear attention without an order of tokens, in PyTorch's own functions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from tilebook.casting import autocast_on
from tilebook.kernels.bidirectional.features import NAMED, FeatureMap, divided, logarithms
from tilebook.kernels.bidirectional.form import HIDDEN
from tilebook.torch_ops import recording


def _weights(mask: torch.Tensor | None, wide: torch.dtype) -> torch.Tensor | None:
    """Logarithms of what keys count for, (B, 1, K, 1)."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        found = torch.zeros_like(mask, dtype=wide).masked_fill(mask, -torch.inf)
    else:
        found = mask.to(wide).masked_fill(mask <= HIDDEN, -torch.inf)
    return found[:, None, :, None]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, omega: torch.Tensor | None,
    feature_map: str, scale: float, eps: float, wide: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """o (B, H, S, V), the state (B, H, V + 2, F) of `kernels`, den (B, H, S). Products in the dtype of q, or `wide`."""
    with torch.autocast(q.device.type, enabled=False) if autocast_on(q) else nullcontext():  # features are exponents
        return _forward(q, k, v, mask, omega, NAMED.get(feature_map, _same), scale, eps, wide)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, omega: torch.Tensor | None,
    mapped: FeatureMap, scale: float, eps: float, wide: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    products, wide = wide or q.dtype, wide or torch.promote_types(q.dtype, torch.float32)
    weights = _weights(mask, wide)
    rows, columns = q.to(wide), k.to(wide)
    if weights is not None:  # what is hidden may be anything
        hidden = weights == -torch.inf
        columns, v = columns.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    if omega is None:
        top = columns.new_zeros(*k.shape[:2], 1, columns.shape[-1])
        phi_q, phi_k = mapped(rows), mapped(columns)
        if weights is not None:
            phi_k = phi_k * weights.exp()
    else:
        directions = omega.to(wide).sum(0)
        rows, columns = (logarithms(x, directions, scale) for x in (rows, columns))
        if weights is not None:
            columns = columns + weights
        phi_q, phi_k, top = divided(rows, columns)
    phi_q, phi_k = phi_q.to(products), phi_k.to(products)
    state = (v.to(products).mT @ phi_k).to(wide) if products != torch.float16 else v.to(wide).mT @ phi_k.to(wide)
    z = phi_k.sum(2, dtype=wide)
    den = (phi_q.to(wide) * z[:, :, None]).sum(-1)
    room = 1.0 if products != torch.float16 else max(1, k.shape[2])
    o = (phi_q @ (state / room).to(products).mT).to(wide) / ((den + eps) / room)[..., None]
    return o.to(v.dtype), torch.cat((state, z[:, :, None], top.to(wide)), 2), den


def plain(tensors: tuple[Any, ...], options: tuple[Any, ...]) -> torch.Tensor:
    """o, of an entry's tensors and options."""
    return forward(*tensors, *options)[0]


def gradients(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    omega: torch.Tensor | None, o: Any, state: Any, den: Any, feature_map: str, scale: float, eps: float,
    wide: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk and dv, by autograd."""
    with recording():
        apart = [x.detach().requires_grad_() for x in (q, k, v)]
        found = forward(apart[0], apart[1], apart[2], mask, omega, feature_map, scale, eps, wide)[0]
        return torch.autograd.grad(found, apart, do)
