"""Linear attention whose states forget by channel, each token as it says itself.

Gated linear attention (GLA, Yang et al., 2024, https://arxiv.org/abs/2312.06635); it is called as
`tilebook.gated_linear_attention`, with log-decays (B, H, S, D).
"""

from __future__ import annotations

from typing import Any

import torch

from tilebook import dispatch
from tilebook.call import Way, native
from tilebook.casting import autocast
from tilebook.kernels.channel_decay.entry import CHANNELS, arguments, registered

__all__: list[str] = []


def attend(route: Way, tensors: tuple[Any, ...], scale: float) -> tuple[torch.Tensor, ...]:
    """(o, state) of q, k, v, log-decays (B, H, S, D) and a state or None, by what serves the call."""
    tensors = *autocast(*tensors[:3]), *tensors[3:]
    CHANNELS.check(tensors, (scale,))
    if route == "pytorch" or (route == "direct" and not tensors[2].numel()):
        return CHANNELS.plain(tensors, (scale,))  # type: ignore[no-any-return]
    if route == "op":
        return CHANNELS.through(tensors, (scale,))[:2]
    args, forward = arguments(tensors, (scale,)), registered()[0]
    choice = dispatch.known(forward, args) or dispatch.lookup(forward, args)
    if native(choice, tensors):
        choice.calls += 1
        return CHANNELS.plain(tensors, (scale,))  # type: ignore[no-any-return]
    return CHANNELS.direct(choice, tensors, (scale,))[:2]
