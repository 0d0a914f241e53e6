"""The feature maps that kernels make of rows, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tilebook.kernels.bidirectional.features import constants, projection

PERFORMER = "performer"
MAPS = ("elu+1", "relu", "softmax", PERFORMER, "none")

FEATURES = 64
"""Of Performer, as its study had them."""

SEED = 0


def directions(
    width: int, features: int, seed: int, scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Performer's ω, times √scale: (2, features, width) of a 16-bit dtype, whose sum they are; else (1, …)."""
    if torch.compiler.is_compiling() or device.type == "meta" or torch._C._len_torch_dispatch_stack():
        return _directions(width, features, seed, scale, dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _directions(width, features, seed, scale, dtype, device)  # memory of the graph's own
    with constants(), torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
        return _kept(int(width), features, seed, scale, dtype, device)


def _directions(
    width: int, features: int, seed: int, scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    found: torch.Tensor = (projection(width, features, seed) * scale**0.5).to(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return found.to(dtype)[None]
    high = found.to(dtype)
    return torch.stack((high, (found - high.double()).to(dtype)))


_kept: Callable[..., torch.Tensor] = functools.lru_cache(maxsize=64)(_directions)
