"""Which kernel `F.scaled_dot_product_attention` runs by itself, as PyTorch decides it."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from tilebook.device import Device

_CUDNN_FIRST = (2, 11)
"""From this version of PyTorch on cuDNN comes before FlashAttention-2 on the GPUs below."""

_CUDNN_AFTER = 91500
_CUDNN_GPUS = frozenset({"sm_90", "sm_100"})


@functools.cache
def cudnn_first(arch: str) -> bool:
    """Does PyTorch prefer cuDNN's attention on GPUs of this architecture (sdp_utils.cpp, `priority_order`)?"""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if arch not in _CUDNN_GPUS or version < _CUDNN_FIRST or os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return False
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.is_available()) and cudnn.version() > _CUDNN_AFTER


def native(name: str, problem: Any, device: Device) -> bool:
    """Is an implementation of that name what PyTorch's function runs for this problem on this GPU?"""
    return name == "torch" or (name == "cudnn" and cudnn_first(device.arch) and not problem.form.composed)
