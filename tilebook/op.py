"""The vocabulary: op, config, space, implementation, and what is said of problems. No CUDA calls, no SQL, no Triton."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from tilebook.errors import meant
from tilebook.inputs import *  # noqa: F403 (a kernel family has its whole vocabulary from here)
from tilebook.problem import *  # noqa: F403
from tilebook.problem import Cost, Problem, UsageError
from tilebook.source import KERNELS, digest
from tilebook.stated import source

if TYPE_CHECKING:
    from tilebook.device import Device

Value = int | str | bool


class Config(Mapping[str, Value]):
    """One point of a space: immutable, hashable, equal by content, with a canonical JSON text as its key."""

    __slots__ = ("_key", "_values")

    def __init__(self, values: Mapping[str, Value] | None = None, /, **axes: Value) -> None:
        self._values: dict[str, Value] = {**(values or {}), **axes}
        self._key: str | None = None  # of the 100,000 points of a space most are rejected before anyone asks

    @property
    def key(self) -> str:
        if self._key is None:
            self._key = json.dumps(self._values, sort_keys=True, separators=(",", ":"))
        return self._key

    def __getitem__(self, axis: str) -> Value:
        return self._values[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.key == other.key

    def __repr__(self) -> str:
        return " ".join(f"{axis}={value}" for axis, value in self._values.items())

    def number(self, axis: str) -> int:
        """The value of an integer axis."""
        return int(self._values[axis])

    def replace(self, **axes: Value) -> Config:
        return Config({**self._values, **axes})


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """2ⁿ from `low` to `high`, both included."""
    return tuple(1 << n for n in range(low.bit_length() - 1, high.bit_length()))


@dataclass(frozen=True)
class Space:
    """The configs of one implementation that are worth trying.

    axes:    ordered values of each axis, neighbours on which are neighbours in the search.
    reject:  (problem, config, device) → why this config cannot run or is not worth trying, or None.
    default: (problem, device) → the config that always runs there, which `reject` accepts.
    work:    (problem, config) → what the config really does (see Cost); used to rank configs for an absent GPU.
    later:   axes that came after the first verdicts, with the value that does as before. A config leaves the axis out
             there, so that trials and verdicts from before it are of configs that the space still has.
    carries: (problem, config, device) → may a config that won on a near problem serve this one, untried?
    """

    axes: Mapping[str, tuple[Value, ...]]
    reject: Callable[[Any, Config, Device], str | None]
    default: Callable[[Any, Device], Config]
    work: Callable[[Any, Config], Cost] | None = None
    later: Mapping[str, Value] = field(default_factory=dict)
    carries: Callable[[Any, Config, Device], bool] = lambda problem, config, device: True

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def configs(self) -> Iterator[Config]:
        for values in itertools.product(*self.axes.values()):
            yield self.config(dict(zip(self.axes, values, strict=True)))

    def config(self, values: Mapping[str, Value]) -> Config:
        """The config of these values, without the later axes that are as before."""
        return Config({axis: v for axis, v in values.items() if axis not in self.later or v != self.later[axis]})

    def value(self, config: Mapping[str, Value], axis: str) -> Value:
        """A config's value on an axis, left out or not."""
        return config[axis] if axis in config else self.later[axis]

    def feasible(self, problem: Problem, device: Device) -> list[Config]:
        return [config for config in self.configs() if self.reject(problem, config, device) is None]

    def defaults(self, problem: Problem, device: Device) -> Iterator[Config]:
        """The default, then what may stand in for it: the other feasible configs, fewest steps on the axes first."""
        default = self.default(problem, device)
        yield default

        def order(config: Config) -> tuple[int, str]:
            pairs = ((v.index(self.value(each, axis)) for each in (config, default)) for axis, v in self.axes.items())
            return sum(abs(a - b) for a, b in pairs), config.key

        yield from sorted((each for each in self.feasible(problem, device) if each != default), key=order)

    def neighbours(self, config: Config) -> Iterator[Config]:
        """Configs one step away on one axis."""
        for axis, values in self.axes.items():
            at = values.index(self.value(config, axis))
            for near in (at - 1, at + 1):
                if 0 <= near < len(values):
                    yield self.config({**config, axis: values[near]})

    def contains(self, config: Mapping[str, Value]) -> bool:
        """Is it a point of the space, written as configs are?"""
        whole = config.keys() <= self.axes.keys() <= config.keys() | self.later.keys()
        written = all(value in self.axes[axis] for axis, value in config.items()) if whole else False
        return written and all(config.get(axis) != value for axis, value in self.later.items())


P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class Answers:
    """What is right on one set of inputs, where no reference says so: what most configs agree on.

    steps: of each output, how many of its largest value, and of its root mean square, a candidate may be off.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[torch.Tensor, ...]
    steps: tuple[float, ...]


class Answering(Protocol):
    """What says what is right where no reference does. Both raise TuningError where nothing is to be said.

    numbers: kinds of unusual inputs, beside outliers, on which candidates are judged."""

    numbers: tuple[str, ...]

    def learn(self, problem: Any, device: Any) -> None:
        """Finds out once what has to be known of a problem before it is judged."""

    def __call__(self, problem: Any, device: Any, seed: int) -> Answers: ...


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to compute an op. With a space it is tunable, and its function takes the keyword `config`.

    `proven` says for which problems it has been seen right on a GPU; the rest it serves only where a verdict covers
    them, since the tuner has verified it there. `external` names the package that its kernels are from, if they are
    not ours: it compiles them itself, at their first call, and its version says what they are. `timed` is what a
    program's own call runs, where that is less than the op's outputs take; it is timed in the function's place.
    """

    op: Op[Any]
    name: str
    function: Callable[..., Any]
    space: Space | None = None
    available: Callable[[Device], bool] = lambda device: True
    supports: Callable[[Any], bool] = lambda problem: True
    deterministic: bool = True
    proven: Callable[[Any], bool] = lambda problem: True
    external: str = ""
    timed: Callable[..., Any] | None = None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the source of our launcher, its kernels and what they call; empty where they are not ours.

        Comments, docstrings, layout and the space do not count: a verdict outlives them.
        """
        ours = self.function.__module__.startswith(f"{KERNELS}.") and self.op.implementations.get(self.name) is self
        known = source(self.op.name, self.name) if ours else None
        return self.digested() if known is None else known

    def digested(self) -> str:
        """The digest, of the source as it is: `digest` where nothing is stated of these files."""
        ours = self.space is not None and not self.external
        return hashlib.sha256(digest(self.function).encode()).hexdigest() if ours else ""

    def __call__(self, *args: Any, config: Config | None = None) -> tuple[torch.Tensor, ...]:
        outputs = self.function(*args) if self.space is None else self.function(*args, config=config)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def to_time(self, *args: Any, config: Config | None = None) -> Any:
        """The call whose time counts."""
        return self(*args, config=config) if self.timed is None else self.timed(*args)

    def can_run(self, problem: Problem, device: Device) -> bool:
        repeatable = self.deterministic or not getattr(problem, "deterministic", False)
        return repeatable and self.supports(problem) and self.available(device)


class Op(Generic[P]):
    """One mathematical operation with a fixed signature, its reference and its implementations.

    `reference` is eager PyTorch in the dtype of its inputs: called on inputs upcast to fp32 it gives the truth that
    every implementation is judged by. The implementation named `torch` is the fallback where no kernel applies, and
    its error against the truth is the yardstick for the others. `fused` says for which problems PyTorch's own function
    is one that people would have called and that is fast: those it serves wherever no verdict of their own says more.
    `native` names the implementations that are what this function runs by itself for a problem on a GPU, so that a call
    which one of them won is left to it. `answers` is somebody else's kernel's word for what is right, in the place of
    the reference.
    """

    def __init__(
        self,
        name: str,
        problem: type[P],
        reference: Callable[..., Any],
        direction: str,
        fused: Callable[[P], bool] = lambda problem: False,
        native: Callable[[str, P, Device], bool] = lambda name, problem, device: name == "torch",
        family: str = "",
    ) -> None:
        self.name = name
        self.problem = problem
        self.reference = reference
        self.direction = direction
        self.fused = fused
        self.native = native
        self.backward: Op[Any] | None = None  # the op of the gradients, posed by a problem with the same fields
        self.answers: Answering | None = None
        self.captured = "torch"  # runs where a graph is captured and nothing is compiled yet, if it takes the problem
        self.family = family or reference.__module__.removeprefix("tilebook.kernels.").split(".")[0]
        self.implementations: dict[str, Implementation] = {}

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def implementation(
        self,
        name: str,
        *,
        space: Space | None = None,
        available: Callable[[Device], bool] = lambda device: True,
        supports: Callable[[P], bool] = lambda problem: True,
        deterministic: bool = True,
        proven: Callable[[P], bool] = lambda problem: True,
        external: str = "",
        timed: Callable[..., Any] | None = None,
    ) -> Callable[[Callable[..., Any]], Implementation]:
        """Registers a function with the op's signature as one way to compute it."""

        def register(function: Callable[..., Any]) -> Implementation:
            made = Implementation(
                self, name, function, space, available, supports, deterministic, proven, external, timed
            )
            self.implementations[name] = made
            return made

        return register

    @property
    def tunables(self) -> list[Implementation]:
        """The implementations that have a space."""
        return [each for each in self.implementations.values() if each.space is not None]

    @property
    def tunable(self) -> Implementation:
        """Our own kernel, named `triton`, else the first with a space: its default is the baseline."""
        ours = self.implementations.get("triton")
        return ours if ours is not None else next(each for each in self.tunables if not each.external)

    @property
    def pytorchs(self) -> tuple[str, ...]:
        """The implementations that are kernels of PyTorch's own functions, in whose places a verdict may serve."""
        return tuple(dict.fromkeys(("torch", self.captured)))

    def uncompiled(self, problem: P, device: Device | None) -> Implementation:
        """What needs no kernel of ours to be compiled first, and reads nothing on the host where it can."""
        found = self.implementations.get(self.captured)
        if found is not None and device is not None and found.can_run(problem, device):
            return found
        return self.implementations["torch"]

    @property
    def digest(self) -> str:
        """What verdicts depend on: the source of our own kernel. Those of other implementations retire no verdict."""
        return self.tunable.digest

    def digest_of(self, implementation: str) -> str | None:
        """The digest of an implementation's source, "" where it is not ours, None where there is none of that name."""
        found = self.implementations.get(implementation)
        return None if found is None else found.digest


_OPS: dict[str, Op[Any]] = {}


def define(
    name: str,
    problem: type[P],
    *,
    direction: str = "fwd",
    fused: Callable[[P], bool] = lambda problem: False,
    native: Callable[[str, P, Device], bool] = lambda name, problem, device: name == "torch",
    family: str = "",
) -> Callable[[Callable[..., Any]], Op[P]]:
    """Makes the decorated reference function an op. `direction` is "fwd" or "bwd"; the rest as `Op` has it.

    family: what the command line calls it and its like, where that is not the name of its folder.
    """

    def register(reference: Callable[..., Any]) -> Op[P]:
        made = Op(name, problem, reference, direction, fused, native, family)
        _OPS[name] = made
        return made

    return register


def _everything(family: str) -> str:
    """The module that registers a family's ops and loads Triton; public functions do without until a kernel runs."""
    found = importlib.util.find_spec(family)
    package = found is not None and found.submodule_search_locations is not None
    return f"{family}.ops" if package and importlib.util.find_spec(f"{family}.ops") is not None else family


@functools.cache
def _load_families() -> Sequence[str]:
    """Imports every kernel family; says of those that cannot be imported why. Of these no op stays registered."""
    kernels, broken = importlib.import_module("tilebook.kernels"), []
    for module in pkgutil.iter_modules(kernels.__path__):
        try:
            importlib.import_module(_everything(f"tilebook.kernels.{module.name}"))
        except Exception as error:  # a change of Triton's or Gluon's interface must not take all the others down
            broken.append(f"kernel family {module.name} cannot be imported: {type(error).__name__}: {error}")
            warnings.warn(broken[-1], RuntimeWarning, stacklevel=3)
            where = f"tilebook.kernels.{module.name}."
            for name in [name for name, each in _OPS.items() if each.reference.__module__.startswith(where)]:
                del _OPS[name]
    return broken


def ops() -> Mapping[str, Op[Any]]:
    """Every op of every kernel family, by name. A family that cannot be imported is left out, with a warning."""
    _load_families()
    return _OPS


def get(name: str) -> Op[Any]:
    """The op of that name; module:kernel is somebody else's. Raises UsageError with the known names."""
    if ":" in name:
        made: Op[Any] = importlib.import_module("tilebook.foreign.ops").get(name)
        return made
    try:
        return ops()[name]
    except KeyError:
        known = f"no op {name!r}{meant(name, ops())}; there are {', '.join(sorted(ops()))}"
        raise UsageError("; ".join([known, *_load_families()])) from None


def recorded() -> None:
    """Imports the kernels of others that a tune is about, if it is about any."""
    importlib.import_module("tilebook.foreign.ops").read()


def families() -> Mapping[str, Sequence[Op[Any]]]:
    """The ops by kernel family, in the order of registration."""
    grouped: dict[str, list[Op[Any]]] = {}
    for each in ops().values():
        grouped.setdefault(each.family, []).append(each)
    return grouped


def suites(chosen: Iterable[Op[Any]]) -> Mapping[str, Sequence[tuple[Op[Any], Problem]]]:
    """The suites that these ops take part in, by name."""
    found: dict[str, list[tuple[Op[Any], Problem]]] = {}
    for each in chosen:
        for name, problems in each.problem.suites().items():
            found.setdefault(name, []).extend((each, problem) for problem in problems)
    return found
