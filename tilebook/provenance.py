"""Who makes a record, on which machine, in which run: what records say beside when, and with which versions.

A user is named only by the file `config.toml` in tilebook's folder of settings, for records are passed on:

    name = "Ada"          # nobody, where it is left out
    machine = "node 17"   # where it is left out, digits that stand for this machine and tell nobody which it is
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import tomllib
import warnings
from pathlib import Path

from tilebook.errors import RegistryError
from tilebook.registry import checks
from tilebook.registry.target import settings_folder


def made() -> dict[str, str]:
    """What this process writes into its records: `machine`, `run`, and `by` where the user has a name."""
    told = _settings()
    by = {"by": told["name"]} if "name" in told else {}
    return {**by, "machine": told.get("machine") or _machine(), "run": _run()}


def _settings() -> dict[str, str]:
    try:
        place = settings_folder() / "config.toml"
        content = tomllib.loads(place.read_text(encoding="utf-8"))
        return {name: checks.label(content[name], name) for name in ("name", "machine") if name in content}
    except (FileNotFoundError, NotADirectoryError, RegistryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:  # no reason not to run
        warnings.warn(f"{place} cannot be read, and counts for nothing: {error}", stacklevel=3)
        return {}


@functools.cache
def _machine() -> str:
    try:
        known = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        known = ""
    return hashlib.sha256(f"tilebook {known} {socket.gethostname()}".encode()).hexdigest()[:16]


@functools.cache
def _run() -> str:
    return os.urandom(8).hex()
