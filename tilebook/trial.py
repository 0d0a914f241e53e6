"""What a module computes, tried on random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


class Left(Exception):
    """The module stays as it is; the text says why."""


def result(function: Function, *args: Any) -> Any:
    """What a module gives, without gradients. Raises Left where it does not take one tensor."""
    try:
        with torch.no_grad():
            return function(*args)
    except Exception as broken:
        raise Left(f"cannot be tried: {type(broken).__name__}") from None


def alike(theirs: Any, ours: torch.Tensor) -> bool:
    """Are these the same numbers but for a few roundings?"""
    if not isinstance(theirs, torch.Tensor) or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
        return False
    size = theirs.float().abs().max().item()
    allowed = 8 * torch.finfo(theirs.dtype).eps * size
    return size > 0 and bool((theirs.float() - ours.float()).abs().max().item() <= allowed)
