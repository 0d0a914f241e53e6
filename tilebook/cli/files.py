"""Files that the user names: what is there is not lost, and what is no plain file is written through."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tilebook.errors import RegistryError

_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


@contextmanager
def written(name: str) -> Iterator[TextIO]:
    """A stream to write an export to, whole or not at all where it is a plain file.

    Raises RegistryError where another file than an export is there, a registry above all.
    """
    if name in _STDOUT:
        if sys.__stdout__ is None:
            raise RegistryError("stdout is closed: nothing can be written to it")
        yield sys.stdout
        sys.stdout.flush()
        return
    place = Path(os.path.realpath(name))  # a link stays one; what it leads to is written
    if place.exists() and not stat.S_ISREG(place.stat().st_mode):
        with named(name), open(name, "w", encoding="utf-8") as stream:
            yield stream
        return
    if place.exists() and not _is_export(place):
        raise RegistryError(f"{name} is there and is no export: it is left as it is")
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with named(name):
            with partial.open("w", encoding="utf-8") as stream:
                yield stream
            partial.replace(place)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Has errors of writing, which do not say where that was, name the file that the user has named."""
    try:
        yield
    except BrokenPipeError:
        raise  # who reads has read enough
    except OSError as error:
        raise RegistryError(f"{name} cannot be written: {error.strerror or error}") from error


def _is_export(place: Path) -> bool:
    from tilebook.registry.lines import is_header

    with place.open("rb") as file:
        head = file.readline(4096)
    return not head or is_header(head)


def is_url(name: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


@contextmanager
def opened(name: str, most_bytes: int, most_s: float) -> Iterator[TextIO]:
    """A stream to read an export from; the limits are for what a URL names. Raises OSError, and as `fetched` does."""
    if is_url(name):
        from tilebook.cli.fetch import fetched

        with fetched(name, most_bytes, most_s) as stream:
            yield stream
        return
    if name in _STDIN:
        if sys.stdin is None:
            raise RegistryError("stdin is closed: there is nothing to read")
        yield text(sys.stdin.buffer, name)
        return
    with open(name, "rb") as file, text(file, name) as stream:
        yield stream


def text(file: BinaryIO, name: str, most_bytes: int | None = None) -> TextIO:
    """The lines of an export, unpacked where its first bytes say that it is packed by gzip.

    most_bytes: that it may have when it is unpacked.
    """
    peeking = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)  # type: ignore[type-var, unused-ignore]
    if peeking.peek(2)[:2] == _GZIP:
        return io.TextIOWrapper(io.BufferedReader(_Unpacked(peeking, name, most_bytes)), "utf-8", newline="\n")
    return io.TextIOWrapper(peeking, encoding="utf-8", newline="\n")


_GZIP = b"\x1f\x8b"


class _Unpacked(io.RawIOBase):
    """What a gzip file has in it, read as it is asked for: a little file may be a very long one."""

    def __init__(self, file: BinaryIO, name: str, most_bytes: int | None) -> None:
        import gzip

        self._file, self._name, self._most = gzip.GzipFile(fileobj=file, mode="rb"), name, most_bytes
        self._left = math.inf if most_bytes is None else most_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            part = self._file.read(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            raise RegistryError(f"{self._name} is no whole gzip file: {error}") from error
        self._left -= len(part)
        if self._left < 0:
            raise RegistryError(f"{self._name} has more than {(self._most or 0) / 1e6:.0f} MB unpacked: see --max-size")
        buffer[: len(part)] = part
        return len(part)
