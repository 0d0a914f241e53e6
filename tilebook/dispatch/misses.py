"""The ledger of problems that programs asked for and no verdict covers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from tilebook import registry as store
from tilebook.dispatch.choice import Choice
from tilebook.registry import ledger

# An implementation of ours reaches about this share of the roofline: enough to weigh one miss against another.
_TYPICAL_EFFICIENCY = 0.5


def misses_of(choices: Sequence[Choice], counted: Mapping[int, int] = MappingProxyType({})) -> list[store.Miss]:
    """Those of the choices that no verdict covers, heaviest first.

    counted: by a choice's id, how many of its calls somebody else counts.
    """
    found = []
    for choice in choices:
        calls = choice.calls - counted.get(id(choice), 0)
        if choice.gpu is None or choice.source == "exact" or calls <= 0:
            continue
        gpu = choice.gpu
        where = store.Device(*gpu.identity)
        try:
            time_ms = 1e3 * choice.problem.floor_s(gpu) / _TYPICAL_EFFICIENCY
        except KeyError:  # a dtype that no kernel takes, of which nobody tunes a problem
            continue
        if math.isfinite(time_ms):
            found.append(store.Miss(choice.implementation.op.name, choice.problem.key, where, calls, time_ms))
    return sorted(found, key=lambda miss: -miss.calls * miss.time_ms)


def store_misses(counted: Sequence[store.Miss]) -> None:
    """Adds a process's misses to the ledger, where a registry that can be written exists already."""
    with contextlib.suppress(Exception):  # the program is over; what it computed stands
        ledger.count(counted)
