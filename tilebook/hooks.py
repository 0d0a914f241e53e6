"""Modules that somebody listens to."""

from __future__ import annotations

from typing import Any

from torch import nn

_any_global: Any = nn.modules.module._has_any_global_hook


def hooked(module: nn.Module) -> bool:
    """Would somebody hear of a call of the module, who does not of a call of its parameters?"""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or bool(_any_global())
