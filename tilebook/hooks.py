"""Modules that somebody listens to."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilebook.left import ORDINARY

_any_global: Any = nn.modules.module._has_any_global_hook


def hooked(module: nn.Module) -> bool:
    """Would somebody hear of a call of the module, who does not of a call of its parameters?"""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or bool(_any_global())


def usual(*modules: Any, of: type[nn.Module] = nn.Linear) -> bool:
    """Are these of PyTorch's own class, with ordinary parameters, to whose calls nobody listens?"""
    return all(
        type(each) is of
        and all(x is None or type(x) in ORDINARY for x in each._parameters.values())
        and not hooked(each)
        and "forward" not in each.__dict__
        for each in modules
    )
