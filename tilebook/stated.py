"""What `inventory.json` states of the ops, while the files that it was made from are those that are here.

To read and compare all of it takes 7 ms; to take the digests of the sources of one op, up to 130.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("inventory.json")

# What an op's entry is made of, constants that kernels take from elsewhere among it; the rest of the package may change
# without changing one.
_MADE_FROM = ("op.py", "problem.py", "source.py", "inventory.py", "stated.py", "layout.py", "windows.py", "kernels")


@functools.cache
def stated(file: Path = FILE) -> Mapping[str, Mapping[str, Any]] | None:
    """Op → its entry, as `inventory.Entry.content` made it; None where there is no file, or it was made from others."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return dict(found["ops"]) if found["made_from"] == made_from() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def source(op: str, implementation: str) -> str | None:
    """The digest of an implementation's source, of an op of the package's own; None where it is not stated."""
    try:
        found = (stated() or {})[op]["sources"][implementation]
    except (KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def made_from() -> str:
    """The digest of the files that are here."""
    whole = hashlib.sha256()
    for name in sorted(name for each in _MADE_FROM for name in _files(each)):
        whole.update(f"{name}\n".encode())
        with open(f"{FILE.parent}/{name}", "rb") as file:
            whole.update(file.read().replace(b"\r\n", b"\n"))
    return whole.hexdigest()


def _files(name: str) -> Iterator[str]:
    """A file of the package, or those with source below a folder of it."""
    if name.endswith(".py"):
        yield name
        return
    with os.scandir(FILE.parent / name) as entries:
        for each in entries:
            if each.name.endswith(".py") or each.is_dir():
                yield from _files(f"{name}/{each.name}")
