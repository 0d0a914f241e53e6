"""The registry: every trial, every verdict, who measured it, where, how sure. It knows names, keys and JSON only."""

from tilebook.registry.backend import RegistryError
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
    Verdict,
    VerdictStatus,
    canonical,
)
from tilebook.registry.store import Registry, ship

__all__ = [
    "ConfigValue",
    "DenyList",
    "Device",
    "Environment",
    "Failure",
    "ImportReport",
    "Json",
    "Layers",
    "Miss",
    "Registry",
    "RegistryError",
    "Revocation",
    "Status",
    "Trial",
    "Verdict",
    "VerdictStatus",
    "canonical",
    "export",
    "load",
    "ship",
]
