"""Registries' files read without SQLite, by descriptors that stay open. Standard library only.

SQLite's locks are POSIX's, which belong to a process: where any descriptor of a file is closed, all of them on it are
gone. So a thread that read a header and closed the file would let another process write while one of ours does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
MOST = 256
"""Files that are held; of more, those are let go that nobody has asked for the longest."""

_PART = 1 << 20

_held: dict[tuple[int, int], int] = {}  # by device and inode, which are nobody else's as long as they are held
_alone = threading.Lock()


def read(path: Path, size: int) -> bytes:
    """A file's first bytes. Raises OSError."""
    with _alone:
        return os.pread(_descriptor(path), size, 0)


def parts(path: Path) -> Iterator[bytes]:
    """All of a file, in parts. Raises OSError."""
    with _alone:
        number = _descriptor(path)
    place = 0
    while part := os.pread(number, _PART, place):
        place += len(part)
        yield part


def _descriptor(path: Path) -> int:
    key = _key(os.stat(path))
    if key not in _held:
        number = os.open(path, READ)
        key = _key(os.fstat(number))  # another file may be there by now
        if key in _held:
            return number  # it stays open, too
        _let_go()
        _held[key] = number
    _held[key] = _held.pop(key)  # the last that was asked for
    return _held[key]


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _let_go() -> None:
    """Closes those of files that are no more, where nobody can meet anybody, and the oldest of too many."""
    gone = [key for key, number in _held.items() if os.fstat(number).st_nlink == 0]
    left = [key for key in _held if key not in gone]
    for key in [*gone, *left[: max(0, len(left) + 1 - MOST)]]:
        os.close(_held.pop(key))


def _forked() -> None:
    global _alone
    _alone = threading.Lock()  # a thread that is not here may have had it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
