"""What other people's kernels and their problems are called in registries. No PyTorch: records are read without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from tilebook.problem import Problem


def is_foreign(op: str) -> bool:
    """Is it the name of somebody else's kernel, module:kernel?"""
    return ":" in op


@dataclass(frozen=True)
class Key(Problem):
    """A problem of a kernel: the values of its autotuner's key, and its tensors' dtypes. `text` is its canonical JSON.

    Near ones are no neighbours: what a value means is the kernel's affair.
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

    def check(self) -> None: ...


class Anybodys:
    """What is known of somebody else's kernel without importing it: its problems, not its source."""

    problem = Key
    digest = ""

    def digest_of(self, implementation: str) -> str | None:
        return ""
