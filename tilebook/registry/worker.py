"""The process that does a job's chunks, see `workers`. It loads what its job needs, reads nothing of the user's
environment, says nothing, and ends with its parent, whatever ended that.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
from collections.abc import Callable
from typing import Any, NoReturn

from tilebook.registry.workers import framed, version, whole, widen

MOST_DATA = 64 << 20
"""Bytes that the process may have for its own: where a stranger's file asks for more, the chunk is not done here."""

_LOOK_MS = 1_000  # a parent's pipes may outlive it, in a process that it has forked


def main(parent: str) -> NoReturn:
    """parent: its process id."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _limit()
        _Pipes(int(parent)).serve()
    except BaseException:  # the parent has its own way to what is not done
        os._exit(1)


def _limit() -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = MOST_DATA if most == resource.RLIM_INFINITY else min(MOST_DATA, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


class _Pipes:
    """Messages of the parent, on stdin, and to it, on stdout."""

    def __init__(self, parent: int) -> None:
        self._parent, self._said = parent, bytearray()
        for pipe in (0, 1):
            os.set_blocking(pipe, False)
        with contextlib.suppress(OSError):
            widen(1)

    def serve(self) -> NoReturn:
        job, settings = self._take()
        do = JOBS[job](settings)
        self._give(version())
        while True:
            self._give(do(self._take()))

    def _take(self) -> Any:
        while (size := whole(self._said)) is None:
            self._wait(0, select.POLLIN)
            if not (more := os.read(0, 1 << 20)):
                os._exit(0)
            self._said += more
        found = marshal.loads(self._said[8:size])
        del self._said[:size]
        return found

    def _give(self, value: Any) -> None:
        rest = memoryview(framed(marshal.dumps(value)))
        while rest:
            self._wait(1, select.POLLOUT)
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(1, rest) :]

    def _wait(self, pipe: int, event: int) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        while not poll.poll(_LOOK_MS):
            if os.getppid() != self._parent:
                os._exit(0)


Do = Callable[[Any], Any]


def _records(settings: Any) -> Do:
    from tilebook.registry.incoming import packed

    return lambda chunk: packed(chunk, *settings)


def _lines(settings: Any) -> Do:
    from tilebook.registry.outgoing import verdicts_of

    return verdicts_of(*settings)


def _trials(settings: Any) -> Do:
    from tilebook.registry.outgoing import trials_of

    return trials_of(*settings)


JOBS: dict[str, Callable[[Any], Do]] = {"records": _records, "verdicts": _lines, "trials": _trials}
"""What can be done: of settings, what is made of a chunk."""
