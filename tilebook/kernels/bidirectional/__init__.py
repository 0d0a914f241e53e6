"""Linear attention in which every token sees all, its feature maps in the kernels (`tilebook.linear_attention`).

Katharopoulos et al., 2020 (https://arxiv.org/abs/2006.16236); Performer's features: Choromanski et al., 2021
(https://arxiv.org/abs/2009.14794).
"""

from __future__ import annotations

from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Way, native
from tilebook.casting import autocast
from tilebook.kernels.bidirectional.check import check
from tilebook.kernels.bidirectional.entry import BIDIRECTIONAL, arguments, registered
from tilebook.kernels.bidirectional.features import check_rows, directions_for
from tilebook.kernels.bidirectional.form import FEATURES, MAPS, PERFORMER, SEED

__all__: list[str] = []


def named(feature_map: Any) -> bool:
    """Is it a map that `attend` has?"""
    return feature_map is None or (type(feature_map) is str and feature_map in MAPS)


def attend(
    route: Way, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, feature_map: Any,
    eps: float,
) -> torch.Tensor:  # fmt: skip
    """o (B, H, S, V) of a call with a named map. mask: (B, K), True where a key is hidden, or fp32 numbers m, by e^m of
    which it counts more or less, −infinity for a hidden one."""
    q, k, v = autocast(q, k, v)
    name = "none" if feature_map is None else feature_map
    check_rows(q, k)
    omega, scale = None, float(q.shape[-1] ** -0.5)
    if name == PERFORMER:
        omega, scale = directions_for(q, FEATURES, SEED, None, q.dtype)
    tensors, options = (q, k, v, mask, omega), (name, scale, eps)
    args = choice = None
    learnt = mask is not None and mask.requires_grad  # which no kernel has a gradient of
    if route == "direct" and q.numel() and v.ndim == 4 and v.numel() and not learnt:
        args = arguments(tensors, options)
        choice = dispatch.known(registered()[0], args)
    if choice is None:  # a call like one before is not checked again
        check(*tensors, *options)
        if route == "op" and not learnt:
            return BIDIRECTIONAL.through(tensors, options)[0]
        if args is None:
            return BIDIRECTIONAL.plain(tensors, options)  # type: ignore[no-any-return]
        choice = dispatch.lookup(registered()[0], args)
    if native(choice, tensors):
        choice.calls += 1
        return BIDIRECTIONAL.plain(tensors, options)  # type: ignore[no-any-return]
    return BIDIRECTIONAL.direct(choice, tensors, options)[0]
