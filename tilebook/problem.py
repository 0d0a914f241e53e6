"""Problems: what of a call an implementation's speed depends on, as keys and as written on the command line.

No PyTorch: commands that only read records ask here too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from tilebook.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tilebook.device import Device

__all__ = [
    "Cost",
    "Problem",
    "UsageError",
    "cdiv",
    "choice",
    "demand",
    "flag",
    "next_power_of_2",
    "pattern",
    "size",
]

_NAME = re.compile(r"[A-Za-z0-9_]{1,40}")


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not less than n ≥ 1."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    """How many pieces of that size hold n."""
    return -(-n // size)


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations and bytes through device memory.

    As a problem's cost it is the floor of any implementation (each input read once, each output written once);
    as a space's `work` it is what one config really does, padding and re-reads through L2 included.
    """

    flops: float
    bytes: float


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


def _fits(value: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether a field that was declared so can have this value."""
    if "letter" in metadata:
        return type(value) is int and 1 <= value < 1 << 62
    if metadata.get("flag") or metadata.get("demand"):
        return type(value) is bool
    if "choices" in metadata:
        return value in metadata["choices"]
    if "pattern" in metadata:
        return value == "" or (isinstance(value, str) and re.fullmatch(metadata["pattern"], value) is not None)
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


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

    HALVED: ClassVar[frozenset[str]] = frozenset()
    """Dimensions of whose difference `distance` may count no more than half: of all others it counts all."""

    TRANSFER: ClassVar[float] = 0.0
    """How much of a config's measured lead over PyTorch's kernel is left at least on a problem that is `like` the
    measured one (benchmarks/transfer.py); 0 where nobody knows."""

    def like(self, measured: Problem) -> bool:
        """Is what was measured of a config on the other problem worth something here, see `TRANSFER`?

        What is like any problem is like itself.
        """
        return False

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
        """The problem of a key. Raises ValueError or TypeError where it is none: a registry may be a stranger's."""
        values = json.loads(key)
        if not isinstance(values, dict):
            raise ValueError(f"{key} is no problem")
        for field in cls._fields():
            if field.name in values and not _fits(values[field.name], field.metadata):
                raise ValueError(f"{field.name} cannot be {values[field.name]!r}")
        return cls(**values)

    @classmethod
    def of(cls, *args: Any) -> Self:
        """The problem that a call of the op with these arguments poses."""
        raise NotImplementedError

    def inputs(self, device: torch.device | str, seed: int) -> tuple[Any, ...]:
        """Random arguments for one call of the op; the same seed gives the same arguments."""
        raise NotImplementedError

    def bucket(self) -> Self:
        """The problem that a call of these dimensions poses, which dispatch asks for: `of` may round some of them."""
        return type(self).of(*self.inputs("meta", 0))

    def cost(self) -> Cost:
        raise NotImplementedError

    def floor_s(self, device: Device) -> float:
        """Seconds that any implementation needs at least on this GPU, by its datasheet."""
        cost = self._least
        return max(cost.flops / device.flops, cost.bytes / device.bandwidth)

    @functools.cached_property
    def _least(self) -> Cost:
        return self.cost()  # asked for at every point of a space

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
    @functools.cache  # asked for with every key and every distance
    def _fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        return dataclasses.fields(cls)

    @property
    def torch_dtype(self) -> torch.dtype:
        from tilebook.inputs import DTYPES

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
        if values.get("tf32") and dtype != "fp32":
            raise UsageError(f"shape {text!r}: tf32 is a way to multiply fp32 tensors, not {dtype}")
        problem = cls(**values)
        problem.check()
        problem.demand_room()
        return problem

    def room(self) -> float:
        """Bytes that the tensors of one call have at least: what it reads and writes, each once."""
        return self._least.bytes

    def demand_room(self) -> None:
        """Raises UsageError where one call's tensors are more than any GPU of the catalogue has memory for."""
        from tilebook.device import CATALOGUE

        most = max(CATALOGUE.values(), key=lambda device: device.memory)
        held = f"{most.name}, the largest of the catalogue, has {most.memory / 1e9:.0f} GB"
        for field in self._fields():
            if "letter" in field.metadata and getattr(self, field.name) > most.memory:  # before anything is counted
                letter = field.metadata["letter"]
                raise UsageError(f"{letter}{getattr(self, field.name)} is more than there is memory for: {held}")
        try:
            least = self.room()
        except NotImplementedError:  # what commands know of a family without loading it
            return
        if least > most.memory:
            needs = f"{least / 1e9:,.0f} GB" if least < 1e15 else f"{least / 1e9:.3g} GB"
            raise UsageError(f"one call of {self.label} needs {needs} at least, and {held}")

    def check(self) -> None:
        """Raises UsageError where the fields contradict each other."""

    def apart(self, other: Problem) -> float:
        """Sum of |log2| of the ratios of all dimensions, of those too for which a near value will not do."""
        sizes = [field.name for field in self._fields() if "letter" in field.metadata]
        return sum(abs(math.log2(getattr(self, name) / getattr(other, name))) for name in sizes)

    def distance(self, other: Problem) -> float:
        """Sum of |log2| of the ratios of the dimensions; infinite where a verdict for one cannot serve the other."""
        if type(other) is not type(self):
            return math.inf
        total = 0.0
        for name, near in self._counted():
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if not near:
                return math.inf
            total += abs(math.log2(mine / theirs))
        return total

    @property
    def kin(self) -> tuple[Any, ...]:
        """What is the same in all problems that are at a finite distance."""
        return type(self), *(getattr(self, name) for name, near in self._counted() if not near)

    @classmethod
    @functools.cache
    def _counted(cls) -> tuple[tuple[str, bool], ...]:
        """The fields that a distance is made of, and whether a near value of them will do; first those for which none
        will, of which most problems have one."""
        fields = [field for field in cls._fields() if not field.metadata.get("demand")]
        counted = [(each.name, "letter" in each.metadata and each.name not in cls.EXACT) for each in fields]
        return tuple(sorted(counted, key=lambda each: each[1]))
