"""Where records may come from: a registry, or an export of one."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from tilebook.registry import lines, shipped
from tilebook.registry.difference import Told
from tilebook.registry.filereader import FileReader, reader
from tilebook.registry.layers import SHIPPED
from tilebook.registry.overview import overviews
from tilebook.registry.target import Target, user_folder
from tilebook.registry.texts import Record, Written

LAYERS = ("user", "shipped")
"""Names that stand for the user's own registry and for what the package ships."""


def place(name: str) -> str:
    """The registry or file that is called so; of what ships, whose text may be newer, it is built. Raises
    RegistryError."""
    if name == "shipped":
        return str(shipped.ready(SHIPPED) or SHIPPED)
    return str(user_folder() / "registry.db") if name == "user" else name


def is_export(name: str) -> bool:
    """Is there an export of a registry rather than a registry? Nothing but the first line is read."""
    path = Target.parse(place(name)).path
    try:
        if path is None or not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return lines.is_header(file.readline(4096))
    except OSError:
        return False


def verdicts(name: str) -> tuple[list[Told], list[str]]:
    """The verdicts of a registry or an export, and what was wrong with it. Raises RegistryError, OSError."""
    if is_export(name):
        return [Told.of(each) for each in exported(name) if isinstance(each, Written)], []
    with reader(place(name)) as registry:
        if not isinstance(registry, FileReader) or registry.schema < 3:
            return list(map(Told.of, registry.each_verdict())), registry.problems
        return [Told(each, each.said) for each in overviews(registry)], registry.problems


def exported(name: str) -> Iterator[Record]:
    """The records of an export. Raises RegistryError, OSError."""
    with Path(place(name)).open(encoding="utf-8", newline="\n") as stream:
        for _, record in lines.read(stream, origin="imported", trusted=False):
            yield record
