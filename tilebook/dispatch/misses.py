"""The ledger of problems that programs asked for and no verdict covers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from tilebook import registry as store
from tilebook.device import Device
from tilebook.dispatch.choice import Choice
from tilebook.op import Problem
from tilebook.registry import ledger
from tilebook.registry.records import Guess

# An implementation of ours reaches about this share of the roofline: enough to weigh one miss against another.
_TYPICAL_EFFICIENCY = 0.5


def estimated_ms(problem: Problem, gpu: Device) -> float | None:
    """About how long a call takes; None for a dtype that no kernel takes, of which nobody tunes a problem."""
    try:
        time_ms = 1e3 * problem.floor_s(gpu) / _TYPICAL_EFFICIENCY
    except KeyError:
        return None
    return time_ms if math.isfinite(time_ms) else None


def misses_of(
    choices: Sequence[Choice],
    counted: Mapping[int, int] = MappingProxyType({}),
    measured: Mapping[tuple[str, str], float] = MappingProxyType({}),
) -> list[store.Miss]:
    """Those of the choices that no verdict covers, heaviest first.

    counted: by a choice's id, how many of its calls somebody else counts. measured: by op and problem, milliseconds of
    a call where this program has timed some.
    """
    found = []
    for choice in choices:
        calls = choice.calls - counted.get(id(choice), 0)
        if choice.gpu is None or choice.source == "exact" or calls <= 0:
            continue
        name, problem = choice.implementation.op.name, choice.problem
        known = measured.get((name, problem.key))
        time_ms = known or estimated_ms(problem, choice.gpu)
        if time_ms is not None:
            kind = Guess if known is None else store.Miss
            found.append(kind(name, problem.key, store.Device(*choice.gpu.identity), calls, time_ms))
    return sorted(found, key=lambda miss: -miss.calls * miss.time_ms)


def store_misses(counted: Sequence[store.Miss]) -> None:
    """Adds a process's misses to the ledger, where a registry that can be written exists already."""
    with contextlib.suppress(Exception):  # the program is over; what it computed stands
        ledger.count(counted)
