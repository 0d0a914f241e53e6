"""What is installed, as far as a reader of records must know it: each op's problems, axes and sources.

To import the kernel families means to import PyTorch and Triton, seconds for a command that prints a table. What such a
command asks of them stands in `inventory.json`, with a digest of the files that it was made from; where these are
others, somebody is at work on the kernels, and the families are imported after all. `make inventory` writes it anew.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tilebook import bounds
from tilebook.errors import UsageError, meant
from tilebook.foreign.names import Anybodys, is_foreign
from tilebook.problem import Problem
from tilebook.stated import FILE, made_from, stated

if TYPE_CHECKING:
    from tilebook.op import Op


@dataclass(frozen=True)
class Entry:
    """An op without its functions.

    ours:    its own kernel, the first of its tunable implementations.
    sources: implementation → the digest of its source; "" where that is not ours.
    axes:    implementation → the axes of its space, none where it has no space.
    fields:  those of its problems, as `dataclasses.field` takes them.
    """

    name: str
    family: str
    ours: str
    sources: Mapping[str, str]
    axes: Mapping[str, frozenset[str]]
    fields: tuple[tuple[str, str, Mapping[str, Any]], ...]

    @property
    def digest(self) -> str:
        return self.sources[self.ours]

    def digest_of(self, implementation: str) -> str | None:
        """The digest of an implementation's source, "" where it is not ours; None where there is none of that name."""
        return self.sources.get(implementation)

    @functools.cached_property
    def problem(self) -> type[Problem]:
        """Its problems as they are read from keys: with labels and checks, without inputs and costs."""
        check = bounds.OF.get(self.family, lambda problem: None)
        return type("Problem", (_Told,), {"FIELDS": tuple(_made(*each) for each in self.fields), "check": check})

    def content(self) -> dict[str, Any]:
        axes = {name: sorted(each) for name, each in self.axes.items()}
        rest = {"family": self.family, "ours": self.ours, "sources": dict(self.sources), "axes": axes}
        return {**rest, "fields": [list(each) for each in self.fields]}


class _Told(Problem):
    """A problem of the fields that are told of it: what the dataclass of these would be, which takes 3 ms to make."""

    FIELDS: ClassVar[tuple[dataclasses.Field[Any], ...]] = ()

    def __init__(self, **values: Any) -> None:
        for field in self.FIELDS:
            value = values.pop(field.name, field.default)
            if value is dataclasses.MISSING:
                raise TypeError(f"{field.name} is missing")
            object.__setattr__(self, field.name, value)
        if values:
            raise TypeError(f"there is no {', '.join(values)}")

    @classmethod
    @functools.cache
    def _fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        return cls.FIELDS

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in self.FIELDS)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._values() == self._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        return f"Problem({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in self.FIELDS)})"


def _made(name: str, kind: str, more: Mapping[str, Any]) -> dataclasses.Field[Any]:
    default = {"default": more["default"]} if "default" in more else {}
    made: dataclasses.Field[Any] = dataclasses.field(**default, metadata=more["metadata"])
    made.name, made.type = name, kind
    return made


class Known(Protocol):
    """What of an op is known either way. digest: "" where its source is not known here."""

    @property
    def problem(self) -> type[Problem]: ...

    @property
    def digest(self) -> str: ...

    def digest_of(self, implementation: str) -> str | None: ...


def ops() -> Mapping[str, Known]:
    """Every op, by name: as the file has it, or itself where the families are loaded already, or must be."""
    if "tilebook.op" not in sys.modules and (known := read()) is not None:
        return known
    from tilebook import op

    return op.ops()


def find(name: str) -> Known | None:
    """The op of that name, None where there is none; of somebody else's kernel what is known of all."""
    return Anybodys() if is_foreign(name) else ops().get(name)


def get(name: str) -> Known:
    """The op of that name. Raises UsageError with the known names."""
    if is_foreign(name):
        return Anybodys()
    known = ops()
    if name in known:
        return known[name]
    if any(isinstance(each, Entry) for each in known.values()):
        raise UsageError(f"no op {name!r}{meant(name, known)}; there are {', '.join(sorted(known))}")
    from tilebook import op

    return op.get(name)  # says which there are, and why others are not


def axes() -> Mapping[str, Mapping[str, frozenset[str]]]:
    """Op → implementation → the axes of its space: what a config of it may name."""
    known = ops().items()
    return {name: each.axes if isinstance(each, Entry) else _axes(each) for name, each in known}


def _axes(op: Any) -> Mapping[str, frozenset[str]]:
    return {each.name: frozenset(each.space.axes if each.space else ()) for each in op.implementations.values()}


def of(op: Op[Any]) -> Entry:
    """An op's entry, from the op."""
    return Entry(
        op.name,
        op.family,
        op.tunable.name,
        {each.name: each.digested() for each in op.implementations.values()},
        _axes(op),
        tuple(_field(each) for each in dataclasses.fields(op.problem)),
    )


def _field(field: dataclasses.Field[Any]) -> tuple[str, str, Mapping[str, Any]]:
    default = {} if field.default is dataclasses.MISSING else {"default": field.default}
    metadata = {key: list(value) if isinstance(value, tuple) else value for key, value in field.metadata.items()}
    return field.name, str(field.type), {**default, "metadata": metadata}


@functools.cache
def read(file: Path = FILE) -> Mapping[str, Entry] | None:
    """What the file has; None where there is none, or it was made from other files than those that are here."""
    try:
        return {name: _entry(name, each) for name, each in found.items()} if (found := stated(file)) else None
    except (ValueError, KeyError, TypeError):
        return None


def _entry(name: str, content: Mapping[str, Any]) -> Entry:
    fields = tuple((each, kind, more) for each, kind, more in content["fields"])
    axes = {implementation: frozenset(each) for implementation, each in content["axes"].items()}
    return Entry(name, content["family"], content["ours"], content["sources"], axes, fields)


def installed() -> Mapping[str, Entry]:
    """The entries of the package's own ops, from the ops; a program may have registered others."""
    from tilebook import op

    return {n: of(each) for n, each in op.ops().items() if each.reference.__module__.startswith("tilebook.kernels.")}


def write(file: Path = FILE) -> None:
    """Makes the file of the families that are here."""
    entries = {name: each.content() for name, each in sorted(installed().items())}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each, sort_keys=True)}" for name, each in entries.items())
    text = f'{{"made_from": {json.dumps(made_from())}, "ops": {{\n{lines}\n}}}}\n'
    file.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write()
