"""Finds the fastest correct way to run attention and an MLP on this GPU, writes it down, and uses it.

The public functions are those of the kernel families (`tilebook.attention`, `tilebook.mlp`, …).
"""

from __future__ import annotations

import importlib.util
import pkgutil
from typing import Any

__version__ = "0.1.0"


def _public() -> dict[str, str]:
    """Public function → module of the kernel family that offers it."""
    kernels = importlib.import_module("tilebook.kernels")
    names = [f"tilebook.kernels.{family.name}" for family in pkgutil.iter_modules(kernels.__path__)]
    return {function: name for name in names for function in importlib.import_module(name).__all__}


def __getattr__(name: str) -> Any:
    # Families are found, not listed, so that adding one touches one file; and `import tilebook` stays light.
    # A module of the package is none of theirs, and `from tilebook import …` asks here before it imports one.
    own = name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is not None
    if not own and name in (public := _public()):
        found = getattr(importlib.import_module(public[name]), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'tilebook' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})
