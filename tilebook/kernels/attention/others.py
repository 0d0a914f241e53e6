"""The implementations of attention that are not ours: which there are, where they run, what they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tilebook.device import Device
from tilebook.kernels.attention import efficient, flash4, flex, peers, torch_flash
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd


def _register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None,
    available: Callable[[Device], bool],
    supports: Callable[[Any], bool],
) -> None:
    """All of their backward passes add something up in an order of its own each time."""
    attention_fwd.implementation(name, available=available, supports=supports)(forward)
    if backward is not None:
        attention_bwd.implementation(name, available=available, supports=supports, deterministic=False)(backward)


attention_fwd.implementation("torch")(peers.torch_forward)
attention_bwd.implementation("torch", deterministic=False)(peers.torch_backward)
_register("cudnn", peers.cudnn_forward, peers.cudnn_backward, peers.cudnn_available, peers.cudnn_supports)
attention_fwd.implementation(
    "flash_attention_4",
    space=flash4.FORWARD_SPACE,
    external=flash4.PACKAGE,
    available=flash4.available,
    supports=flash4.supports,
)(flash4.forward)
attention_bwd.implementation(
    "flash_attention_4", available=flash4.available, supports=flash4.supports, deterministic=False
)(flash4.backward)
_register("mem_efficient", efficient.forward, efficient.backward, efficient.available, efficient.supports)
_register("torch_flash", torch_flash.forward, torch_flash.backward, torch_flash.available, torch_flash.supports)
_register("flex_attention", flex.forward, None, flex.available, flex.supports)
