"""Models of transformers that keep `attn_implementation="sdpa"`: their masks have notes while tilebook is enabled, and
keys that heads share are not copied for each of them where the note serves, as transformers does under any mask."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilebook.dispatch import forced
from tilebook.huggingface import OLDEST
from tilebook.huggingface.masks import capturing, note
from tilebook.kernels.attention.pytorch import BOUNDS
from tilebook.kernels.attention.structure import by_note, notes

NAME = "sdpa"
FEW = min(BOUNDS) / (1 << 14)
"""Pairs of rows and columns of which no model's heads, wide as they are, make a large call: a row of q has at most so
many numbers."""

_THEIRS = "position_bias", "softcap"
"""What their attention function takes, or refuses, and a note knows nothing of."""

_Function = Callable[..., Any]


class _Place:
    """Where models look a function of transformers up by NAME: a register, and the function that is there by itself."""

    def __init__(self, module: str, register: str, theirs: str, ours: Callable[[_Function], _Function]) -> None:
        self._module, self._register, self._theirs = module, register, theirs
        self._around = ours
        self._ours: dict[int, _Function] = {}  # by the id of theirs, which they keep

    def turn(self, on: bool) -> None:
        """Puts ours there or takes it out. A function that somebody else has put there keeps its place."""
        module: Any = sys.modules.get(self._module)
        register: Any = getattr(getattr(module, self._register, None), "_global_mapping", {})
        theirs, there = getattr(module, self._theirs, None), register.get(NAME)
        if theirs is None or there is None:
            return
        ours = self._ours.get(id(theirs))
        if on and there is theirs and _known():
            if ours is None:
                ours = self._ours[id(theirs)] = self._around(theirs)
            register[NAME] = ours
        elif not on and ours is not None and there is ours:
            register[NAME] = theirs


class _Noting:
    """Our functions in the places of transformers' own. Who has kept ours has theirs while tilebook is off."""

    def __init__(self) -> None:
        self.on = False
        self._places = (
            _Place("transformers.masking_utils", "AttentionMaskInterface", "sdpa_mask", self._noting),
            _Place("transformers.modeling_utils", "AttentionInterface", "sdpa_attention_forward", self._sharing),
        )

    def turn(self, on: bool) -> None:
        self.on = on
        for each in self._places:
            each.turn(on)

    def _noting(self, theirs: _Function) -> _Function:
        """Their function, with a note on what it gives."""

        @functools.wraps(theirs)
        def sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
            mask: Tensor | None = theirs(*args, **kwargs)
            if mask is None or torch.compiler.is_compiling():  # a trace is to read nothing more
                return mask
            if self.on and not args and type(mask) is Tensor and _worth(mask):
                note(mask, **kwargs)
            return mask

        return sdpa_mask

    def _sharing(self, theirs: _Function) -> _Function:
        """Their attention function, which is not asked where a note serves heads that share keys."""

        @functools.wraps(theirs)
        def sdpa_attention_forward(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            # The trace's question before the note's: whose id is asked breaks the graph, or is what it holds for.
            known = attention_mask is not None and not torch.compiler.is_compiling() and self.on and not args
            if known and id(attention_mask) in notes.held:
                found = _shared(query, key, value, attention_mask, **kwargs)
                if found is not None:
                    return found.transpose(1, 2).contiguous(), None
            return theirs(module, query, key, value, attention_mask, *args, **kwargs)

        return sdpa_attention_forward


def _shared(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, /, dropout: float = 0.0, scaling: Any = None, **more: Any
) -> Tensor | None:
    """Attention by the note on the mask, (B, H, Sq, D), where heads share keys; None where it is not to serve."""
    if type(query) is not Tensor or type(key) is not Tensor or key.ndim != 4 or key.shape[1] == query.shape[1]:
        return None
    if dropout or more.get("output_attentions") or any(more.get(each) is not None for each in _THEIRS):
        return None
    return by_note(query, key, value, mask, scaling, True, F.scaled_dot_product_attention)


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
