"""Masks of transformers' models that keep `attn_implementation="sdpa"`, with notes while tilebook is enabled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilebook.dispatch import forced
from tilebook.huggingface import OLDEST
from tilebook.huggingface.masks import capturing, note
from tilebook.kernels.attention.drop_in import BOUNDS

NAME = "sdpa"
FEW = min(BOUNDS) / (1 << 14)
"""Pairs of rows and columns of which no model's heads, wide as they are, make a large call: a row of q has at most so
many numbers."""

_MODULE = "transformers.masking_utils"


class _Noting:
    """Our mask function in the place of transformers' own, in the register that its models look it up in."""

    def __init__(self) -> None:
        self.on = False
        self._ours: dict[int, Callable[..., Any]] = {}  # by the id of theirs, which they keep

    def turn(self, on: bool) -> None:
        """Puts ours there or takes it out. A function that somebody else has put there keeps its place."""
        self.on = on
        module: Any = sys.modules.get(_MODULE)
        register: Any = getattr(getattr(module, "AttentionMaskInterface", None), "_global_mapping", {})
        theirs, there = getattr(module, "sdpa_mask", None), register.get(NAME)
        if theirs is None or there is None:
            return
        ours = self._ours.get(id(theirs))
        if on and there is theirs and _known():
            if ours is None:
                ours = self._ours[id(theirs)] = self._noting(theirs)
            register[NAME] = ours
        elif not on and ours is not None and there is ours:
            register[NAME] = theirs

    def _noting(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """Their function, with a note on what it gives. Who has kept ours has theirs while tilebook is off."""

        @functools.wraps(theirs)
        def sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
            mask: Tensor | None = theirs(*args, **kwargs)
            if mask is None or torch.compiler.is_compiling():  # a trace is to read nothing more
                return mask
            if self.on and not args and type(mask) is Tensor and _worth(mask):
                note(mask, **kwargs)
            return mask

        return sdpa_mask


def _worth(mask: Tensor) -> bool:
    """May attention under this mask be large enough for its note to be looked at?

    A mask that a graph makes has other numbers after each replay.
    """
    return (mask.is_cuda and mask.numel() > FEW and not capturing(mask)) or forced()


def _known() -> bool:
    """Is this a version whose masks we know?"""
    version = getattr(sys.modules.get("transformers"), "__version__", "0")
    found = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    return found >= OLDEST


noting = _Noting()
