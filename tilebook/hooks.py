"""Modules that somebody listens to."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilebook.left import ORDINARY

_any_global: Any = nn.modules.module._has_any_global_hook


def hooked(module: nn.Module) -> bool:
    """Would somebody hear of a call of the module, who does not of a call of its parameters?"""
    return _own_hooks(module) or bool(_any_global())


def _own_hooks(module: nn.Module) -> bool:
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_hooks or module._backward_pre_hooks)


def usual(*modules: Any, of: type[nn.Module] = nn.Linear) -> bool:
    """Are these of PyTorch's own class, with ordinary parameters, to whose calls nobody listens?"""
    for each in modules:  # asked in every call: no generator, and what holds for all modules once
        if type(each) is not of or "forward" in each.__dict__ or _own_hooks(each):
            return False
        for x in each._parameters.values():
            if x is not None and type(x) not in ORDINARY:
                return False
    return not _any_global()
