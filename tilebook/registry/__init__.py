"""The registry: every trial, every verdict, who measured it, where, how sure. It knows names, keys and JSON only.

A name is imported when it is first asked for: what dispatch reads (`tilebook.registry.serving`) needs no SQLAlchemy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilebook.errors import RegistryError
    from tilebook.registry.exchange import ImportReport, export, load
    from tilebook.registry.layers import DenyList, Layers
    from tilebook.registry.records import (
        ConfigValue,
        Device,
        Environment,
        Failure,
        Json,
        Miss,
        Revocation,
        Status,
        Trial,
        canonical,
    )
    from tilebook.registry.store import Registry, ship
    from tilebook.registry.target import Locked
    from tilebook.registry.verdict import Again, Finalist, Speedup, Verdict, VerdictStatus

__all__ = [
    "Again",
    "ConfigValue",
    "DenyList",
    "Device",
    "Environment",
    "Failure",
    "Finalist",
    "ImportReport",
    "Json",
    "Layers",
    "Locked",
    "Miss",
    "Registry",
    "RegistryError",
    "Revocation",
    "Speedup",
    "Status",
    "Trial",
    "Verdict",
    "VerdictStatus",
    "canonical",
    "export",
    "load",
    "ship",
]

_MODULES = {
    "exchange": ("ImportReport", "export", "load"),
    "layers": ("DenyList", "Layers"),
    "store": ("Registry", "ship"),
    "target": ("Locked",),
    "verdict": ("Again", "Finalist", "Speedup", "Verdict", "VerdictStatus"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "RegistryError":
        from tilebook.errors import RegistryError

        return RegistryError
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'records')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
