"""What other people's kernels and their problems are called in registries. No PyTorch: records are read without it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from tilebook.problem import Problem


def is_foreign(op: object) -> bool:
    """Is it the name of somebody else's kernel, module:kernel? Damaged rows have names that are no text."""
    return isinstance(op, str) and ":" in op


@dataclass(frozen=True)
class Key(Problem):
    """A problem of a kernel: the values of its autotuner's key, and its tensors' dtypes. `text` is its canonical JSON.

    What a value means is the kernel's affair: no verdict serves another key than its own.
    """

    text: str

    @cached_property
    def key(self) -> str:
        return self.text

    @cached_property
    def values(self) -> Mapping[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found

    @property
    def dtype(self) -> str:
        return str(self.values["dtype"])

    @property
    def label(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.values["key"].items())

    @classmethod
    def from_key(cls, key: str) -> Self:
        values = json.loads(key)
        named = isinstance(values, dict) and values.keys() == {"key", "dtype"} and isinstance(values["dtype"], str)
        plain = named and isinstance(values["key"], dict)
        if not plain or any(isinstance(value, dict | list) for value in values["key"].values()):
            raise ValueError(f"{key} is no problem of a kernel")
        return cls(key)

    def distance(self, other: Problem) -> float:
        """How unlike another key is: where a search may begin with what won there. No verdict serves a near one."""
        if not isinstance(other, Key) or other.dtype != self.dtype:
            return math.inf
        mine, theirs = self.values["key"], other.values["key"]
        if mine.keys() != theirs.keys():
            return math.inf
        return sum(_apart(mine[name], theirs[name]) for name in mine)


def _apart(one: Any, other: Any) -> float:
    if one == other:
        return 0.0
    numbers = all(isinstance(each, int | float) and each > 0 for each in (one, other))
    return abs(math.log2(one / other)) if numbers else 1.0


class Anybodys:
    """What is known of somebody else's kernel without importing it: its problems, not its source."""

    problem = Key
    digest = ""

    def digest_of(self, implementation: str) -> str | None:
        return ""
