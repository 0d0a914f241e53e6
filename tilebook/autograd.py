"""What the families' autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that cannot be differentiated again, like `once_differentiable`, at no cost where nobody tries to.

    Gradients are recorded during a backward pass only under `create_graph=True`.
    """
    guarded = once_differentiable(backward)  # type: ignore[no-untyped-call, unused-ignore]

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run
