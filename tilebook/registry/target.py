"""Where a registry lives: a SQLite file or a PostgreSQL database. Standard library only, as all that dispatch imports.

A SQLite file is recognised by its first 100 bytes before SQLite sees it, so a foreign file is never touched, not even
to replay its journal.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tilebook.errors import RegistryError
from tilebook.registry import held
from tilebook.registry.checks import quoted

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

APPLICATION_ID = 0x74696C65  # "tile", in the SQLite header
SCHEMA_VERSION = 5  # the revision of the newest migration as a number; migrations are named 0001, 0002, ...
OLDEST_READABLE = 1


class Locked(RegistryError):
    """Another process holds the registry's lock: the same may work later."""


class Unreachable(RegistryError):
    """A server does not answer, or there is none: who asks again waits again."""


@dataclass(frozen=True)
class Target:
    """A parsed registry address; `path` for SQLite, `url` for PostgreSQL. `label` hides the password."""

    path: Path | None
    url: URL | None
    label: str

    @classmethod
    def parse(cls, target: str | Path) -> Target:
        """Raises RegistryError for what is no address of a registry."""
        text = str(target)
        if isinstance(target, Path) or "://" not in text:
            if not text:
                raise RegistryError("the registry's path is empty")
            try:
                path = Path(text).expanduser().absolute()
            except (RuntimeError, OSError) as error:
                raise RegistryError(f"registry {text}: {error}") from error
            return cls(path, None, str(path))
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            raise RegistryError("the registry's URL cannot be parsed") from None
        backend = url.drivername.partition("+")[0]
        if backend == "sqlite":
            if not url.database or url.database.startswith((":memory:", "file:")) or url.query:
                raise RegistryError("a SQLite registry is a plain file: sqlite:///path/to/registry.db")
            return cls.parse(Path(url.database))
        if backend in ("postgresql", "postgres"):
            return cls(None, url.set(drivername="postgresql+psycopg"), url.render_as_string(hide_password=True))
        raise RegistryError(f"a registry is a SQLite file or a PostgreSQL URL, not {backend}")


@dataclass(frozen=True)
class Header:
    """What the first 100 bytes of a SQLite file say; None stands for a file that is missing or empty.

    wal: whether it is in WAL mode, or has a log of writes beside it as if it were.
    """

    version: int
    wal: bool


def sniff(path: Path) -> Header | None:
    """Reads a SQLite file's header without SQLite. Raises RegistryError for what is not a tilebook registry."""
    try:
        # A FIFO would keep `open` waiting for somebody to write, and one in a journal's place SQLite itself.
        journal, log = beside(path, "-journal"), beside(path, "-wal")
        for name in (path, journal, log):
            if _waits(name):
                raise RegistryError(f"cannot read registry {path}: {quoted(str(name.name))} is not a regular file")
        refuse_journal(path)
        logged = _size(log) > 0
        head = held.read(path, 100)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RegistryError(f"cannot read registry {path}: {error.strerror}") from error
    if not head:
        return None
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise RegistryError(f"foreign registry file {path}: it is not a SQLite database")
    if struct.unpack(">I", head[68:72]) != (APPLICATION_ID,):
        raise RegistryError(f"{path} is a SQLite database, but not a tilebook registry")
    return Header(version=struct.unpack(">I", head[60:64])[0], wal=2 in head[18:20] or logged)


def beside(path: Path, end: str) -> Path:
    """A file that SQLite keeps beside another, "-journal" or "-wal": beside what a link leads to."""
    return Path(os.path.realpath(path) + end)


_MAGIC = bytes.fromhex("d9d505f920a163d7")


def refuse_journal(path: Path) -> None:
    """Raises RegistryError where the file's journal names another file, which SQLite would delete as it rolls back.

    No registry's does: only a transaction over several databases has such a journal, and a stranger's files may.
    """
    journal = beside(path, "-journal")
    try:
        with open(os.open(journal, held.READ), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(_MAGIC)))
            end = file.read(len(_MAGIC))
    except OSError:  # most often there is none; of one that cannot be read SQLite reads no name either
        return
    if end == _MAGIC:
        raise RegistryError(
            f"cannot open registry {path}: {quoted(journal.name)} beside it is no registry's, and names another file"
        )


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _waits(path: Path) -> bool:
    """Is it neither a file nor a folder, nor missing, as a journal is in the moment in which its writer ends?"""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def user_folder() -> Path:
    """The user's data directory, as platformdirs has it. Raises RegistryError where the user has no home."""
    return _folder("user registry", "XDG_DATA_HOME", "~/.local/share", "user_data_dir")


def settings_folder() -> Path:
    """The user's configuration directory, likewise."""
    return _folder("folder of settings", "XDG_CONFIG_HOME", "~/.config", "user_config_dir")


def _folder(what: str, variable: str, usual: str, elsewhere: str) -> Path:
    if sys.platform.startswith(("linux", "freebsd")):
        # Asked for by every process that dispatches, so not worth an import.
        told = os.environ.get(variable, "")
        base = told if told.strip() else os.path.expanduser(usual)
        if not told.strip() and base.startswith("~"):
            raise RegistryError(f"there is no {what}: neither HOME nor the password file names a home directory")
        return Path(base) / "tilebook"
    import platformdirs

    return Path(getattr(platformdirs, elsewhere)("tilebook", appauthor=False))
