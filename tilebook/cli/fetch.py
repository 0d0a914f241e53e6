"""Exports from elsewhere: file, http and https URLs, so much of them at most and for so long."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any, TextIO
from urllib.parse import unquote_to_bytes, urlsplit

from tilebook.cli.files import text
from tilebook.errors import RegistryError, UsageError
from tilebook.registry.checks import quoted

_CHUNK = 1 << 16


@contextmanager
def fetched(url: str, most_bytes: int, most_s: float) -> Iterator[TextIO]:
    """A stream to read an export from, all of which is here before the first of it is read.

    Raises UsageError for another kind of URL, RegistryError for what cannot be had within these limits.
    """
    try:
        scheme = urlsplit(url).scheme.lower()
    except ValueError as error:
        raise UsageError(f"{url} is no URL: {error}") from error
    with tempfile.TemporaryFile("w+b") as file:
        if scheme == "file":
            _copy(_local(url), file, most_bytes, url)
        elif scheme in ("http", "https"):
            _within(most_s, url, lambda: _download(url, file, most_bytes, most_s))
        else:
            raise UsageError(f"{url}: only file, http and https URLs can be imported")
        file.seek(0)
        with open(file.fileno(), "rb", closefd=False) as again, text(again, url, most_bytes) as stream:
            yield stream


def _local(url: str) -> IO[bytes]:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UsageError(f"{url}: a file of another machine cannot be read")
    name = unquote_to_bytes(os.fsencode(parts.path))  # names of files are bytes, whatever the locale
    if b"\0" in name:
        raise UsageError(f"{url}: no file is called so")
    path = Path(os.fsdecode(name))
    if path.exists() and not path.is_file():
        raise RegistryError(f"{url} is no file")
    return path.open("rb")


def _download(url: str, file: IO[bytes], most_bytes: int, most_s: float) -> None:
    opener = urllib.request.build_opener(_Redirects())
    request = urllib.request.Request(url, headers={"User-Agent": "tilebook", "Accept-Encoding": "identity"})
    try:
        with opener.open(request, timeout=most_s) as response:
            _copy(response, file, most_bytes, url)
    except urllib.error.HTTPError as error:
        raise RegistryError(f"{url}: the server answers {error.code} {quoted(error.reason)}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):  # the connection's own, which may come before that of the whole
            raise _late(url, most_s) from error
        raise RegistryError(f"{url} cannot be read: {quoted(str(reason))}") from error


def _late(url: str, seconds: float) -> RegistryError:
    return RegistryError(f"{url} was not here after {seconds:g} s: see --timeout")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows where a server sends us, but not from https to http, and to nothing that is no web address.

    What a server says beside is not read: it may be without end.
    """

    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        before, after = urlsplit(req.full_url).scheme.lower(), urlsplit(newurl).scheme.lower()
        if after not in ("http", "https") or (before == "https" and after == "http"):
            raise RegistryError(f"{req.full_url} leads to {newurl!a}, which is not followed")
        fp.close()
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _copy(source: Any, file: IO[bytes], most_bytes: int, url: str) -> None:
    left = most_bytes
    with source:
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise RegistryError(f"{url} has more than {most_bytes / 1e6:.0f} MB: see --max-size")
            file.write(chunk)


def _within(seconds: float, url: str, work: Callable[[], None]) -> None:
    """Does the work in a thread that is left behind if it takes longer: a server can drip, a name not resolve."""
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised in the thread that waits
            done.put(error)
        else:
            done.put(None)

    threading.Thread(target=run, daemon=True).start()
    try:
        error = done.get(timeout=seconds)
    except queue.Empty:
        raise _late(url, seconds) from None
    if error is not None:
        raise error
