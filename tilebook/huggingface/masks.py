"""Masks for transformers' models, and notes of what they show."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilebook.kernels.attention.check import Causal
from tilebook.kernels.attention.structure import Lengths, Note, Structure, capturing, notes
from tilebook.kernels.varlen.packs import attention_of_packs

__all__ = ["Lengths", "Structure", "attention_mask", "capturing", "described", "note", "noted"]

_READ = "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"
"""The arguments of a mask function that say what it shows."""


def noted(mask: Tensor) -> Structure | None:
    """What the note on a mask says that nobody has changed since."""
    found = notes.of(mask)
    return None if found is None else found.structure(mask)


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function that transformers calls before the layers: same arguments and result as its `sdpa_mask`.

    Returns:
        None where nothing but `is_causal` hides a pair, else booleans (B, 1, Sq, Sk), True where a pair takes part; in
        eager mode with a note of their structure where there is one.
    """
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is not None and not args and not torch.compiler.is_compiling():
        found = note(mask, **kwargs)
        if found is not None and found.settled() is None:
            notes.drop(mask)
    return mask


def note(mask: Tensor, /, **given: Any) -> Note | None:
    """Notes the structure of a mask that transformers has made of these arguments, if it may have one that we know.

    Nothing is computed yet.
    """
    parts, keep = _parts(given.get("mask_function")), given.get("attention_mask")
    kinds = [kind for kind, _ in parts]
    if "?" in kinds or mask.dtype != torch.bool or torch._C._get_tracing_state() is not None:
        return None
    made_of = [held for _, held in (*parts, ("keys", keep)) if isinstance(held, Tensor)]
    if any(each.is_inference() for each in (mask, *made_of)):  # whoever wrote to one would leave no trace
        return None
    rest = {name: given[name] for name in _READ if name in given}
    # transformers makes no mask where it has looked for padding and found none.
    looked = bool(given.get("allow_is_causal_skip", True) or given.get("allow_is_bidirectional_skip"))
    padded = looked and "left" not in kinds and "both" not in kinds and rest["q_length"] == rest["kv_length"]
    made = Note(lambda: described(**rest, padded=padded), made_of, attention_of_packs if "packs" in kinds else None)
    notes.put(mask, made)
    return made


def described(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    padded: bool = False,
    **_: Any,
) -> Structure | None:
    """The structure of a mask, read off what it is made of; None where a part is unknown or has no such form.

    padded: is there known to be padding? Else the host waits to know.
    """
    if not isinstance(q_offset, int) or (attention_mask is not None and attention_mask.ndim != 2):
        return None  # a static cache has its offset on the GPU
    if q_offset < 0:  # rows before the first one
        return None
    parts = _parts(mask_function)
    kinds = [kind for kind, _ in parts]
    if "?" in kinds or len(set(kinds)) < len(kinds) or not _understood():
        return None
    of = dict(parts)
    causal, packs, window = "causal" in of, of.get("packs"), None
    if "positions" in of and (packs is None or capturing(packs) or not torch.equal(packs, _packs(of["positions"]))):
        return None
    if packs is not None and "positions" not in of and not _in_runs(packs):
        return None
    if "left" in of:
        window = (of["left"] - 1, -1)
    elif "both" in of:
        window = (of["both"], of["both"])
    if window is not None and (window[0] < 0 or {"left", "both"} <= {*of}):
        return None
    # A kernel's diagonal ends in the last row and column or, if it is causal, starts in the first.
    shift = q_offset - kv_offset
    corner: Causal = "bottom_right" if shift == kv_length - q_length else "top_left"
    if (causal or window) and corner == "top_left" and (shift or not causal):
        return None
    keys = None
    if attention_mask is not None:
        whole = F.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))  # copied
        keys = whole[:, kv_offset : kv_offset + kv_length].bool()[:, None, None]
        keys = keys if padded or capturing(keys) or not keys.all() else None
    if packs is not None and (keys is not None or shift or packs.shape[1] != q_length or q_length != kv_length):
        return None
    return Structure(causal and corner, window, keys, packs)


def _parts(function: Any) -> list[tuple[str, Any]]:
    """What must all hold for a pair to be seen: (kind, detail) of each part of transformers' mask function.

    Its functions are closures. Which one a part is, is told by its code; and unknown code is ("?", None).
    """
    code = function.__code__ if type(function) is FunctionType else None
    kind = _kinds().get(id(code), "?")
    if kind in ("causal", "all"):
        return [(kind, None)]
    cells: Any = getattr(function, "__closure__", None) or ()
    if kind == "positions":
        names = function.__code__.co_freevars
        inner = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
        if isinstance(inner.get("position_ids"), Tensor) and callable(inner.get("mask_function")):
            return [*_parts(inner["mask_function"]), (kind, inner["position_ids"])]
    held = cells[0].cell_contents if len(cells) == 1 else None
    if kind == "and" and isinstance(held, tuple):
        return [part for each in held for part in _parts(each)]
    if (kind in ("left", "both") and type(held) is int) or (kind == "packs" and isinstance(held, Tensor)):
        return [(kind, held)]
    return [("?", None)]


@functools.cache
def _kinds() -> dict[int, str]:
    """Kinds of parts, by the `id` of the code of transformers' functions, which live as long as the program."""
    from transformers import masking_utils as theirs

    found = {
        "causal": theirs.causal_mask_function,
        "all": theirs.bidirectional_mask_function,
        "and": theirs.and_masks(theirs.causal_mask_function),
        "left": theirs.sliding_window_overlay(1),
        "both": theirs.sliding_window_bidirectional_overlay(1),
        "packs": theirs.packed_sequence_mask_function(None),
    }
    remap: Any = getattr(theirs, "remap_positions_for_packed_sequence", None)  # newer versions alone
    if remap is not None:
        found["positions"] = remap(theirs.causal_mask_function, None)
    return {id(function.__code__): kind for kind, function in found.items()}


def _in_runs(packs: Tensor) -> bool:
    """Are the tokens of each pack beside each other? The host waits for it."""
    if packs.is_floating_point() or packs.is_complex() or capturing(packs):
        return False
    return bool((packs[..., 1:] >= packs[..., :-1]).all())


def _packs(positions: Tensor) -> Tensor:
    """The packs that transformers finds in positions: within one they rise by 1, as rows and columns do."""
    return (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


@functools.cache
def _understood() -> bool:
    """Do the parts of this version's mask functions hide what `described` takes them to hide?"""
    from transformers import masking_utils as theirs

    cpu: Any = {"device": "cpu"}  # whatever a program has as its default
    rows, columns = torch.arange(7, **cpu)[:, None], torch.arange(7, **cpu)
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2, 2]], **cpu)
    expected: list[tuple[Any, Tensor]] = [
        (theirs.causal_mask_function, columns <= rows),
        (theirs.bidirectional_mask_function, torch.ones(7, 7, dtype=torch.bool, **cpu)),
        (theirs.sliding_window_overlay(3), columns >= rows - 2),
        (theirs.sliding_window_bidirectional_overlay(3), (columns - rows).abs() <= 3),
        (theirs.packed_sequence_mask_function(numbers), numbers.mT == numbers),
    ]
    pair = theirs.and_masks(*[function for function, _ in expected[:3]])
    expected.append((pair, expected[0][1] & expected[2][1]))
    remap: Any = getattr(theirs, "remap_positions_for_packed_sequence", None)
    if remap is not None:
        positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]], **cpu)
        expected.append((theirs.and_masks(remap(pair, positions), expected[4][0]), expected[5][1] & expected[4][1]))
    first: Any = torch.zeros(1, 1, dtype=torch.long, **cpu)
    return all(torch.equal(function(first, first, rows, columns).expand(7, 7), seen) for function, seen in expected)
