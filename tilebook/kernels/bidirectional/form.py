"""The feature maps that kernels make of rows, by name."""

from __future__ import annotations

from typing import Any

import torch

from tilebook.kernels.bidirectional.features import constants, projection

PERFORMER = "performer"
MAPS = ("elu+1", "relu", "softmax", PERFORMER, "none")

FEATURES = 64
"""Of Performer, as its study had them."""

SEED = 0

_MOST = 256
_kept: dict[tuple[Any, ...], torch.Tensor] = {}


def directions(
    width: int, features: int, seed: int, scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Performer's ω, times √scale: (2, features, width) of a 16-bit dtype, whose sum they are; else (1, …)."""
    if torch.compiler.is_compiling() or device.type == "meta" or torch._C._len_torch_dispatch_stack():
        return _directions(width, features, seed, scale, dtype, device)
    key = int(width), features, seed, scale, dtype, device
    if (kept := _kept.get(key)) is not None:
        return kept
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _directions(*key)  # memory of the graph's own
    with constants(), torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
        made = _directions(*key)
    if made.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # other streams will read it, too
    if len(_kept) < _MOST:
        _kept[key] = made
    return made


def _directions(
    width: int, features: int, seed: int, scale: float, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    found: torch.Tensor = (projection(width, features, seed) * scale**0.5).to(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return found.to(dtype)[None]
    high = found.to(dtype)
    return torch.stack((high, (found - high.double()).to(dtype)))
