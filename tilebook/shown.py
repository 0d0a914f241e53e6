"""What a mask of attention shows, as far as a graph tells before the program runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from tilebook.constant_nodes import Constants, ancestors, factors, numbers, shape_of, written, written_to
from tilebook.sizes import Trial, Unknown, regular

_MOST = 1 << 29
"""Numbers of a mask that are looked at, while the program is compiled; of larger ones nothing is known."""

Limits = tuple[int, int]
"""Row i sees columns i - left … i + right; -1 is without limit."""

ALL, CAUSAL = (-1, -1), (-1, 0)


@dataclass(frozen=True)
class Shown:
    """What a mask shows: of the pairs within these limits those whose keys all of `keys` show, booleans (…, 1, Sk)."""

    limits: Limits
    keys: tuple[Node, ...] = ()

    @property
    def plain(self) -> bool:
        """Is it a form that PyTorch has kernels for, without a mask?"""
        return self.limits in (ALL, CAUSAL) and not self.keys


def shown_by(given: Constants, tried: Sequence[Trial], mask: Node, n_q: Any, n_k: Any) -> Shown | None:
    """What a mask shows, if that has limits, of its keys or in all; None where neither is known.

    given: placeholders whose numbers are known. tried: sizes that the graph may have, those first that it has now.
    """
    if not tried:
        return None
    try:
        return _shown(given, tried, mask, n_q, n_k)
    except Unknown:
        return None


def _shown(given: Constants, tried: Sequence[Trial], mask: Node, n_q: Any, n_k: Any) -> Shown | None:
    shape, known = shape_of(mask), {**given, **tried[0].given}
    if shape is None or math.prod(map(tried[0].of, shape)) > _MOST:
        return None
    try:
        if written_to(mask, known):
            return None
        parts, keys = [mask], list[Node]()
    except Unknown:
        found = _factors(known, mask)
        if found is None:
            return None
        parts, keys = found
    limits = _common(parts, given, tried, n_q, n_k)
    return None if limits is None else Shown(limits, tuple(keys))


def _factors(known: Constants, mask: Node) -> tuple[list[Node], list[Node]] | None:
    """Of a mask some of whose factors all rows have, and whose others are constant: the constant ones, and those."""
    parts, between = factors(mask)
    constant, keys = [], []
    for part in parts:
        try:
            if written_to(part, known):
                return None
            constant.append(part)
        except Unknown:
            shape = shape_of(part) or ()
            if not 1 <= len(shape) <= 4 or (len(shape) > 1 and shape[-2] != 1):
                return None
            keys.append(part)
    return None if written((*between, *keys)) else (constant, keys)


def _common(parts: list[Node], given: Constants, tried: Sequence[Trial], n_q: Any, n_k: Any) -> Limits | None:
    """The limits of a product of constants, whatever the sizes are. Raises Unknown."""
    made_of = {each for part in parts for each in ancestors(part, {**given, **tried[0].given})}
    if type(n_q) is type(n_k) is int and not made_of & {*tried[0].given}:
        tried = tried[:1]
    if len(tried) > 1 and not regular(made_of):
        return None
    found: set[Limits | None] = set()
    for trial in tried:
        with torch.no_grad(), _disable_current_modes():
            known = {**given, **trial.given}
            seen = numbers(parts[0], known) if parts else torch.ones(trial.of(n_q), trial.of(n_k), dtype=torch.bool)
            for part in parts[1:]:
                seen = seen & numbers(part, known)
            found.add(_limits(seen, trial.of(n_q), trial.of(n_k)))
        if len(found) > 1 or None in found:
            return None
    (limits,) = found
    return limits if len(tried) == 1 or limits in (ALL, CAUSAL) else None


def _limits(seen: torch.Tensor, n_q: int, n_k: int) -> Limits | None:
    if seen.dtype != torch.bool:
        hidden = seen <= torch.finfo(seen.dtype).min
        if bool(((seen != 0) & ~hidden).any()):
            return None
        seen = ~hidden
    if bool(seen.all()):
        return ALL
    if n_q != n_k or tuple(seen.shape[-2:]) != (n_q, n_k):
        return None
    # If it has limits, the last row tells the one to the left and the first row the other one.
    one = seen[(0,) * (seen.ndim - 2)]
    left, right = int(one[-1].sum()) - 1, int(one[0].sum()) - 1
    place = torch.arange(n_k, device=seen.device)
    band = (place >= place[:, None] - left) & (place <= place[:, None] + right)
    if left < 0 or right < 0 or not bool((seen == band).all()):
        return None
    return left if left < n_k - 1 else -1, right if right < n_k - 1 else -1
