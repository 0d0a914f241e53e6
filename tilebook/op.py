"""The vocabulary: op, problem, config, space, cost, implementation. No CUDA calls, no SQL, no Triton."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import torch

from tilebook.source import digest

if TYPE_CHECKING:
    from tilebook.device import Device

Value = int | str | bool

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name a dtype has in keys and on the command line; dtypes that no kernel knows keep PyTorch's."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def generator(device: torch.device | str, seed: int) -> torch.Generator | None:
    """The source of a problem's random inputs; None on the meta device, which has shapes but no numbers."""
    return None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(seed)


class UsageError(ValueError):
    """A name, shape or option that the user got wrong; its text is one clear line."""


class Config(Mapping[str, Value]):
    """One point of a space: immutable, hashable, equal by content, with a canonical JSON text as its key."""

    __slots__ = ("_values", "key")

    def __init__(self, values: Mapping[str, Value] | None = None, /, **axes: Value) -> None:
        self._values: dict[str, Value] = {**(values or {}), **axes}
        self.key: str = json.dumps(self._values, sort_keys=True, separators=(",", ":"))

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


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations and bytes through device memory.

    As a problem's cost it is the floor of any implementation (each input read once, each output written once);
    as a space's `work` it is what one config really does, padding and re-reads through L2 included.
    """

    flops: float
    bytes: float


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """2ⁿ from `low` to `high`, both included."""
    return tuple(1 << n for n in range(low.bit_length() - 1, high.bit_length()))


@dataclass(frozen=True)
class Space:
    """The configs of one implementation that are worth trying.

    axes:    ordered values of each axis; neighbours on an axis are neighbours in the search.
    reject:  (problem, config, device) → why this config cannot run or is not worth trying, or None.
    default: (problem, device) → the config that always runs there. It must be a point that `reject` accepts.
    work:    (problem, config) → what the config really does (see Cost); used to rank configs for an absent GPU.
    """

    axes: Mapping[str, tuple[Value, ...]]
    reject: Callable[[Any, Config, Device], str | None]
    default: Callable[[Any, Device], Config]
    work: Callable[[Any, Config], Cost] | None = None

    def __len__(self) -> int:
        return math.prod(len(values) for values in self.axes.values())

    def configs(self) -> Iterator[Config]:
        for values in itertools.product(*self.axes.values()):
            yield Config(dict(zip(self.axes, values, strict=True)))

    def feasible(self, problem: Problem, device: Device) -> list[Config]:
        return [config for config in self.configs() if self.reject(problem, config, device) is None]

    def defaults(self, problem: Problem, device: Device) -> Iterator[Config]:
        """The default, then what may stand in for it: the other feasible configs, fewest steps on the axes first."""
        default = self.default(problem, device)
        yield default

        def steps(config: Config) -> int:
            return sum(abs(v.index(config[axis]) - v.index(default[axis])) for axis, v in self.axes.items())

        others = [config for config in self.feasible(problem, device) if config != default]
        yield from sorted(others, key=lambda config: (steps(config), config.key))

    def neighbours(self, config: Config) -> Iterator[Config]:
        """Configs one step away on one axis."""
        for axis, values in self.axes.items():
            at = values.index(config[axis])
            for near in (at - 1, at + 1):
                if 0 <= near < len(values):
                    yield config.replace(**{axis: values[near]})

    def contains(self, config: Mapping[str, Value]) -> bool:
        return set(config) == set(self.axes) and all(config[axis] in values for axis, values in self.axes.items())


def size(letter: str, like: str | None = None) -> Any:
    """A dimension, written `letter` + number on the command line; `like` names the field it defaults to."""
    return dataclasses.field(metadata={"letter": letter, "like": like})


def flag(default: bool = False, *, elided: bool = False) -> Any:
    """A yes/no property of a problem, written as its own name on the command line.

    elided: keys leave it out at its default, so that those made before the property existed stay valid.
    """
    return dataclasses.field(default=default, metadata={"flag": True, "elided": elided})


def choice(*values: str, elided: bool = False) -> Any:
    """A property with named values, the first the default; written as the value on the command line."""
    return dataclasses.field(default=values[0], metadata={"choices": values, "elided": elided})


def pattern(regex: str, usage: str) -> Any:
    """A property written as text that `regex` matches, empty by default and then elided; `usage` explains the text."""
    return dataclasses.field(default="", metadata={"pattern": regex, "usage": usage, "elided": True})


def demand() -> Any:
    """A yes/no demand on implementations that leaves the problem what it is: no key or label has it."""
    return dataclasses.field(default=False, metadata={"demand": True})


@dataclass(frozen=True)
class Problem:
    """One instance of an op. Subclasses are frozen dataclasses of ints, bools and strings with a field `dtype`.

    Fields made by `size` are dimensions (a verdict for a near one may serve); all others must match exactly.
    """

    EXACT: ClassVar[frozenset[str]] = frozenset()
    """Dimensions for which a near value will not do (a head dimension, say)."""

    @functools.cached_property
    def key(self) -> str:
        """Canonical JSON: what a verdict is stored under."""
        values = {}
        for field in self._fields():
            value, meta = getattr(self, field.name), field.metadata
            if not (meta.get("demand") or (meta.get("elided") and value == field.default)):
                values[field.name] = value
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls, key: str) -> Self:
        return cls(**json.loads(key))

    @classmethod
    def of(cls, *args: Any) -> Self:
        """The problem that a call of the op with these arguments poses."""
        raise NotImplementedError

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """Random arguments for one call of the op; the same seed gives the same arguments."""
        raise NotImplementedError

    def cost(self) -> Cost:
        raise NotImplementedError

    def floor_s(self, device: Device) -> float:
        """Seconds that any implementation needs at least on this GPU, by its datasheet."""
        cost = self.cost()
        return max(cost.flops / device.flops, cost.bytes / device.bandwidth)

    def neighbours(self) -> Sequence[Self]:
        """Ragged and larger problems that a candidate must get right too before it may serve this one."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Small problems, ragged ones among them, for tests in Triton's interpreter."""
        raise NotImplementedError

    @classmethod
    def suites(cls) -> Mapping[str, Sequence[Self]]:
        """Named lists of problems for `tilebook tune --suite`."""
        return {}

    @classmethod
    def _fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        return dataclasses.fields(cls)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[getattr(self, "dtype")]  # noqa: B009 (declared by the subclasses)

    @property
    def label(self) -> str:
        """The problem as it is written on the command line; the dtype is an option of its own there."""
        parts = []
        for field in self._fields():
            value, meta = getattr(self, field.name), field.metadata
            if "letter" in meta and not (meta["like"] and value == getattr(self, meta["like"])):
                parts.append(f"{meta['letter']}{value}")
            elif (meta.get("flag") and value) or ("choices" in meta and value != meta["choices"][0]):
                parts.append(field.name if meta.get("flag") else value)
            elif "pattern" in meta and value:
                parts.append(value)
        return ",".join(parts)

    @classmethod
    def grammar(cls) -> str:
        """What `parse` accepts, for help texts and error messages."""
        required: list[str] = []
        optional: list[str] = []
        for field in cls._fields():
            meta = field.metadata
            if "letter" in meta:
                (optional if meta["like"] else required).append(f"{meta['letter']}…")
            elif meta.get("flag"):
                optional.append(field.name)
            elif "choices" in meta:
                optional.append("|".join(meta["choices"]))
            elif "pattern" in meta:
                optional.append(meta["usage"])
        return ",".join(required) + "".join(f"[,{part}]" for part in optional)

    @classmethod
    def parse(cls, text: str, dtype: str) -> Self:
        """Reads a shape such as `B8,H6,S196,D64,causal`. Raises UsageError with the grammar on anything else."""
        values: dict[str, Any] = {"dtype": dtype}
        letters = {f.metadata["letter"].lower(): f.name for f in cls._fields() if "letter" in f.metadata}
        flags = {f.name for f in cls._fields() if f.metadata.get("flag")}
        choices = {value: f.name for f in cls._fields() for value in f.metadata.get("choices", ())}
        patterns = {f.name: f.metadata["pattern"] for f in cls._fields() if "pattern" in f.metadata}
        for token in filter(None, (part.strip() for part in text.split(","))):
            value: Any
            dimension = re.fullmatch(r"([A-Za-z]+)(\d{1,12})", token)
            if dimension and dimension[1].lower() in letters:
                name, value = letters[dimension[1].lower()], int(dimension[2])
                if value < 1:
                    raise UsageError(f"shape {text!r}: {token!r} must be at least 1")
            elif token in flags:
                name, value = token, True
            elif token in choices:
                name, value = choices[token], token
            elif matched := [name for name, regex in patterns.items() if re.fullmatch(regex, token)]:
                name, value = matched[0], token
            else:
                raise UsageError(f"shape {text!r}: {token!r} is not understood; expected {cls.grammar()}")
            if name in values:
                raise UsageError(f"shape {text!r}: {token!r} stands twice")
            values[name] = value
        for field in cls._fields():
            if "letter" in field.metadata and field.name not in values:
                like = field.metadata["like"]
                if like is None:
                    raise UsageError(f"shape {text!r} lacks {field.metadata['letter']}; expected {cls.grammar()}")
                values[field.name] = values[like]
        problem = cls(**values)
        problem.check()
        return problem

    def check(self) -> None:
        """Raises UsageError where the fields contradict each other."""

    def distance(self, other: Problem) -> float:
        """Sum of |log2| of the ratios of the dimensions; infinite where a verdict for one cannot serve the other."""
        if type(other) is not type(self):
            return math.inf
        total = 0.0
        for field in self._fields():
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs or field.metadata.get("demand"):
                continue
            if "letter" not in field.metadata or field.name in self.EXACT:
                return math.inf
            total += abs(math.log2(mine / theirs))
        return total


P = TypeVar("P", bound=Problem)


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to compute an op. With a space it is tunable, and its function takes the keyword `config`.

    `proven` says for which problems it has been seen right on a GPU; the rest it serves only where a verdict covers
    them, since the tuner has verified it there.
    """

    op: Op[Any]
    name: str
    function: Callable[..., Any]
    space: Space | None = None
    available: Callable[[Device], bool] = lambda device: True
    supports: Callable[[Any], bool] = lambda problem: True
    deterministic: bool = True
    proven: Callable[[Any], bool] = lambda problem: True

    def __call__(self, *args: Any, config: Config | None = None) -> tuple[torch.Tensor, ...]:
        outputs = self.function(*args) if self.space is None else self.function(*args, config=config)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def can_run(self, problem: Problem, device: Device) -> bool:
        repeatable = self.deterministic or not getattr(problem, "deterministic", False)
        return repeatable and self.supports(problem) and self.available(device)


class Op(Generic[P]):
    """One mathematical operation with a fixed signature, its reference and its implementations.

    `reference` is eager PyTorch in the dtype of its inputs: called on inputs upcast to fp32 it gives the truth that
    every implementation is judged by. The implementation named `torch` is the fallback where no kernel applies, and
    its error against the truth is the yardstick for the others.
    """

    def __init__(self, name: str, problem: type[P], reference: Callable[..., Any], direction: str) -> None:
        self.name = name
        self.problem = problem
        self.reference = reference
        self.direction = direction
        self.family = reference.__module__.removeprefix("tilebook.kernels.").split(".")[0]
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
    ) -> Callable[[Callable[..., Any]], Implementation]:
        """Registers a function with the op's signature as one way to compute it."""

        def register(function: Callable[..., Any]) -> Implementation:
            made = Implementation(self, name, function, space, available, supports, deterministic, proven)
            self.implementations[name] = made
            return made

        return register

    @property
    def tunable(self) -> Implementation:
        """Our own kernel: the first implementation that has a space."""
        return next(each for each in self.implementations.values() if each.space is not None)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the source of every tunable implementation: launchers, kernels and what they call.

        Comments, docstrings, layout and the spaces do not count: a verdict outlives them.
        """
        parts = [digest(each.function) for each in self.implementations.values() if each.space is not None]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


_OPS: dict[str, Op[Any]] = {}


def define(name: str, problem: type[P], *, direction: str = "fwd") -> Callable[[Callable[..., Any]], Op[P]]:
    """Makes the decorated reference function an op. `direction` is "fwd" or "bwd"."""

    def register(reference: Callable[..., Any]) -> Op[P]:
        made = Op(name, problem, reference, direction)
        _OPS[name] = made
        return made

    return register


@functools.cache
def _load_families() -> None:
    kernels = importlib.import_module("tilebook.kernels")
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"tilebook.kernels.{module.name}")


def ops() -> Mapping[str, Op[Any]]:
    """Every op of every kernel family, by name."""
    _load_families()
    return _OPS


def get(name: str) -> Op[Any]:
    """The op of that name. Raises UsageError with the known names."""
    try:
        return ops()[name]
    except KeyError:
        raise UsageError(f"no op {name!r}; there are {', '.join(sorted(ops()))}") from None


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
