"""Layers of Hugging Face's `kernels` that are here instead of on the Hub: what `kernels.kernelize` gives a model.

A module whose class declares a layer's name gets our `forward` from it, whatever the class computes: the norms that are
called RMSNorm are of several kinds. So the first call tries the module as `tilebook.patch` does, and from then on it
calls a function of ours, or what its class has written.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tilebook.patching import patch
from tilebook.rotation import rotation
from tilebook.trial import Function, served, undisturbed


class Repository:
    """One layer, as `kernels.register_kernel_mapping` takes it (its `LayerRepositoryProtocol`)."""

    def __init__(self, layer_name: str, layer: type[nn.Module]) -> None:
        self.layer_name, self._layer = layer_name, layer

    def load(self) -> type[nn.Module]:
        return self._layer

    def __str__(self) -> str:
        return f"tilebook's {self.layer_name}"


# `kernels` takes of a layer its `forward`, which must have as many arguments as the one that it replaces, of the same
# kinds, and allows it no other members.


class _Alone(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return _settled(self)(hidden_states)


class _Rotation(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        function: Any = type(self)
        theirs = partial(function.forward, self)
        # A compiler fuses the rotation with what is around it.
        if unsqueeze_dim != 1 or torch.compiler.is_compiling() or not served(q):
            return theirs(q, k, cos, sin, unsqueeze_dim)
        return (_rotation(function) or theirs)(q, k, cos, sin)


def _settled(module: nn.Module) -> Function:
    """What a module calls from now on; while it cannot be tried, what its class has written."""
    if not undisturbed() or not all(map(served, module.parameters())):
        return partial(type(module).forward, module)
    module.__dict__.pop("forward", None)
    patch(module)
    return module.forward


_rotations: dict[Any, Function | None] = {}


def _rotation(function: Any) -> Function | None:
    """Our rotation in the place of a function, of which `kernels` makes a class without state; None where it computes
    something else, and while it cannot be tried."""
    if function not in _rotations:
        if not undisturbed():
            return None
        _rotations[function] = rotation(partial(function.forward, function()))
    return _rotations[function]


_LAYERS = {
    "GeGLUMLP": _Alone,
    "RMSNorm": _Alone,
    "RMSNormZeroCentered": _Alone,
    "SwiGLUMLP": _Alone,
    "rotary_pos_emb": _Rotation,
}


def mapping(device: str = "cuda") -> dict[str, dict[str, Repository]]:
    """What `kernels.register_kernel_mapping` and `use_kernel_mapping` take: our layers by name, for this device."""
    return {name: {device: Repository(name, layer)} for name, layer in _LAYERS.items()}


def register() -> None:
    """`tilebook.register_kernels`, which says what it is for. Raises ImportError."""
    from kernels import register_kernel_mapping

    ours = mapping()
    register_kernel_mapping(ours)
    try:
        from transformers.integrations.hub_kernels import get_kernel_mapping_transformers
    except ImportError:  # there is none, or one that this release of `kernels` is not for
        return
    theirs = get_kernel_mapping_transformers()  # which `use_kernels=True` registers once more
    for name, devices in ours.items():
        theirs.setdefault(name, {}).update(devices)
