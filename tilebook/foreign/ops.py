"""An op of somebody else's kernel, which registry, tuner and commands take for one of ours.

Its launcher gets copies of all tensors of a recorded call. What the kernel writes it allocates itself, so that poison,
guard bands and repeats show what they show of our own kernels; what the kernel only reads it must leave as it was.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from tilebook.device import Device
from tilebook.errors import UsageError
from tilebook.foreign import record
from tilebook.foreign.call import WRITTEN, Call, Rule, decoded, heuristic
from tilebook.foreign.given import Given
from tilebook.foreign.kernel import IMPLEMENTATION, Kernel, found, imported, is_given, op_name
from tilebook.foreign.names import Key
from tilebook.foreign.record import Entry, Recorded
from tilebook.launch import launch
from tilebook.op import Config, Cost, Implementation, Op, Space

RECORDED = "TILEBOOK_RECORDED"
"""Names the folder in which a tune's processes find the record that it is about, and the rules."""

RECORD, RULES = "record.json", "rules.json"

_MOST_POINTS = 1_000_000  # of the grid in which a list of configs lies: a verdict's evidence has a bit for each


@dataclass(frozen=True)
class Called(Key):
    """One key of a kernel. `place` tells its recorded calls apart: the first is timed, all are verified."""

    place: int = 0

    OF: ClassVar[Foreign]

    @property
    def recorded(self) -> Recorded | None:
        return self.OF.problems.get(self.text)

    @property
    def call(self) -> Call:
        if self.recorded is None or not self.recorded.calls:
            raise UsageError(f"no call of {self.OF.kernel.op} {self.label} was recorded")
        return self.recorded.calls[self.place]

    @property
    def pattern(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What a kernel does to its tensors is alike in all calls of a key whose tensors are the same ones."""
        return self.key, self.call.aliases

    @property
    def label(self) -> str:
        return super().label + (f" (call {self.place + 1})" if self.place else "")

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        return (*self.call.inputs(device, seed, self.OF.rules), self)

    def bucket(self) -> Self:
        return self

    def cost(self) -> Cost:
        return Cost(0.0, float(self.call.bytes))

    def neighbours(self) -> Sequence[Self]:
        if self.place or self.recorded is None:
            return ()
        return [type(self)(self.text, n) for n in range(1, len(self.recorded.calls))]


class Listed(Space):
    """A space that is a list of configs, within the grid of all their values."""

    listed: tuple[Config, ...]

    def __len__(self) -> int:
        return len(self.listed)

    def configs(self) -> Iterator[Config]:
        return iter(self.listed)


class Foreign:
    """A kernel, what was recorded of it, and what it does to its tensors as far as that is known.

    roles: by key and by which tensors are the same, what the kernel does to each. They are learned where it first runs:
    see `truth`.
    """

    def __init__(self, kernel: Kernel, entry: Entry | None = None, rules: Mapping[str, Rule] | None = None) -> None:
        self.kernel, self.rules = kernel, dict(rules or {})
        self.problems: Mapping[str, Recorded] = {} if entry is None else entry.problems
        listed = tuple(kernel.configs) if entry is None else entry.configs
        self.places = {config: n for n, config in enumerate(listed)}
        self.roles: dict[tuple[str, Any], Mapping[str, str]] = {}

    def op(self) -> Op[Called]:
        from tilebook.foreign.truth import Truth

        kernel = self.kernel
        problem: Any = dataclass(frozen=True)(type("Called", (Called,), {"OF": self, "__annotations__": {}}))
        made = Op(kernel.op, problem, _no_reference, "fwd", family=kernel.module.split(".")[0])
        made.answers = Truth(self, made)
        made.implementations[IMPLEMENTATION] = _Kernels(
            made, IMPLEMENTATION, self.run, self._space(), deterministic=not kernel.atomic
        )
        return made

    def _space(self) -> Space:
        configs = tuple(self.places)
        if not configs:
            raise UsageError(f"{self.kernel.op}: no config of its autotuner can be written down")
        if len({frozenset(config) for config in configs}) > 1:
            raise UsageError(f"{self.kernel.op}: its configs do not all set the same parameters")
        axes = {axis: _ordered({config[axis] for config in configs}) for axis in configs[0]}
        if math.prod(map(len, axes.values())) > _MOST_POINTS:
            raise UsageError(f"{self.kernel.op}: its {len(configs)} configs lie too far apart")
        made = Listed(axes, self._reject, self._default)
        object.__setattr__(made, "listed", configs)
        return made

    def _reject(self, problem: Called, config: Config, device: Device) -> str | None:
        recorded = problem.recorded
        if recorded is None:
            return None
        if config in recorded.failed:
            return "it could not run in the program"
        place = self.places.get(config)
        if place is None or any(call.grids[place] is None for call in recorded.calls):
            return "the kernel's own rules left it out"
        return None

    def _default(self, problem: Called, device: Device) -> Config:
        """What runs where nothing is known: what the program passes itself, or the first that may run."""
        if is_given(self.kernel.tuner):
            passed = Config({axis: problem.values["key"].get(axis) for axis in self.kernel.tuner.axes})
            return next((config for config in self.places if config == passed), next(iter(self.places)))
        return next((c for c in self.places if self._reject(problem, c, device) is None), next(iter(self.places)))

    def run(self, *args: Any, config: Config) -> tuple[torch.Tensor, ...]:
        """One launch on copies of what the kernel writes; returns these, in the order of its arguments."""
        *tensors, problem = args
        call: Call = problem.call
        roles = self.roles.get(problem.pattern, {})
        own = [name for name, each in call.tensors.items() if not each.same]
        placed = [_placed(x, roles.get(name, "in")) for name, x in zip(own, tensors, strict=True)]
        given = self.arguments(call, placed)
        given |= {name: each.of(given[name]) for name, each in call.descriptors.items()}
        self._launch(call, given, config)
        return tuple(x for name, x in zip(own, placed, strict=True) if roles.get(name, "in") in WRITTEN)

    def arguments(self, call: Call, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """A call's arguments by name, of the tensors as `Call.inputs` makes them; for a descriptor, its tensor."""
        own = dict(zip((name for name, each in call.tensors.items() if not each.same), tensors, strict=True))
        given = {name: own[t.same or name].as_strided(t.shape, t.stride) for name, t in call.tensors.items()}
        return {**given, **{name: decoded(value) for name, value in call.values.items()}}

    def _launch(self, call: Call, given: Mapping[str, Any], config: Config) -> None:
        """As the autotuner would have started it."""
        kernel, place = self.kernel, self.places.get(config)
        its, grid = kernel.made(config), None if place is None else call.grids[place]
        if grid is None:
            raise UsageError(f"{kernel.op} was not recorded with {config}")
        whole = {**given, **its.all_kwargs()}
        if kernel.tuner.user_defined_pre_hook:
            kernel.tuner.pre_hook(dict(whole))
        if its.pre_hook is not None:
            its.pre_hook(dict(whole))
        whole |= heuristic(kernel, whole)
        launch(kernel.jit, grid, **whole)


class _Kernels(Implementation):
    """The implementation of an op that is not ours: its source is the kernel's, not the launcher's."""

    @functools.cached_property
    def digest(self) -> str:
        return str(self.op.problem.OF.kernel.digest)


def _no_reference(*args: Any) -> Any:
    raise UsageError("somebody else's kernel has no reference of ours")


def _placed(x: torch.Tensor, role: str) -> torch.Tensor:
    """What the kernel gets in a tensor's place: itself where it only reads it."""
    if role == "in":
        return x
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    if role == "zero":
        made.zero_()
    return made.copy_(x) if role in ("inout", "scratch") else made


def _ordered(values: set[Any]) -> tuple[Any, ...]:
    return tuple(sorted(values, key=lambda value: (str(type(value)), value)))


_made: dict[str, Op[Called]] = {}


def get(name: str) -> Op[Called]:
    """The op of a kernel by its name: as it was recorded, where that is known, else as it can be imported.

    Raises UsageError."""
    read()
    if name not in _made:
        where = _recorded(name) or tuple(name.split(":", 1))
        _made[name] = Foreign(imported(*where)).op()
    return _made[name]


def _recorded(name: str) -> tuple[str, str] | None:
    """Module and name of a kernel whose name is too long for a registry, by the user's own records."""
    with contextlib.suppress(UsageError):
        entries = record.read(record.folder())
        return next(((each.module, each.name) for each in entries if op_name(each.module, each.name) == name), None)
    return None


@functools.cache
def read() -> None:
    """Takes up the record that a tune has left for its processes."""
    if place := os.environ.get(RECORDED):
        folder = Path(place)
        for entry in record.read(folder / RECORD):
            with contextlib.suppress(UsageError):  # who asks for it is told
                add(entry, record.rules(folder / RULES), checked=True)


def add(entry: Entry, rules: Mapping[str, Mapping[str, Rule]], checked: bool = False) -> Op[Called]:
    """Makes a recorded kernel known; it is imported for that. Raises UsageError where it is another by now.

    checked: by the process that started this one. Here constants may differ, where no GPU is to be seen.
    """
    if entry.path and entry.path not in sys.path:
        sys.path.append(entry.path)
    if entry.given:
        kernel = Given(found(entry.module, entry.name), entry.configs).kernel
    else:
        kernel = imported(entry.module, entry.name)
    if not checked and kernel.digest != entry.digest:
        raise UsageError(f"{kernel.op} is not the kernel that was recorded: its source has changed")
    mine: dict[str, Rule] = {}
    for pattern, arguments in rules.items():
        if fnmatch(kernel.op, pattern):
            mine |= arguments
    made = Foreign(kernel, entry, mine).op()
    _made[made.name] = made
    return made


def forget() -> None:
    """What is known of kernels, for tests."""
    _made.clear()
    read.cache_clear()
    importlib.invalidate_caches()
