"""A job's chunks, done by other processes and given back in their order. Standard library only.

What they do is never more than a quicker way: a chunk that no process has done, for whatever reason, is left to whoever
asked for it. Processes are new ones, of this package and nothing else of the program: no fork, which SQLite's state
would not survive, and no import of the program's own main module.
"""

from __future__ import annotations

import contextlib
import marshal
import math
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

MOST = 6
"""Processes that work at once: more would wait for the one that gathers what they do, and take memory."""

_IN_HAND = 2  # chunks that a process has got: the one it does, and the next
_PATIENCE_S = 60.0  # a process that takes longer over a chunk is given up
_LARGEST = 1 << 20  # bytes of a chunk; a larger one stays here
_PIPE_BYTES = 1 << 20  # what Linux lets anybody have of a pipe
_LONGEST_ANSWER = 64 << 20  # bytes
_BEGINNING = "import sys; sys.path.append(sys.argv[1]); from tilebook.registry.worker import main; main(*sys.argv[2:])"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_Chunk = TypeVar("_Chunk")


def count() -> int:
    """How many processes may help here; 0 where there is one core alone, or where none can be started with care."""
    if not hasattr(os, "sched_getaffinity") or not Path(sys.executable or "").name.startswith("python"):
        return 0
    if signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL:
        return 0  # one that ends early would end this program
    cores = min(len(os.sched_getaffinity(0)), _quota())
    return min(cores, MOST) if cores > 1 else 0


def _quota() -> int:
    """The cores whose time a container gets."""
    try:
        most, period = map(float, _QUOTA.read_text().split())
        return max(1, math.ceil(most / period))
    except (OSError, ValueError):
        return sys.maxsize


def mapped(job: str, settings: Any, chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, Any]]:
    """Each chunk with what `worker.JOBS` makes of it, in order; None where that is still to be done.

    Settings, chunks and what is made of them are plain values, as `marshal` takes them. Where there are no more chunks
    because of an error, it comes after those that were there. Processes end with the iterator.
    """
    rest: Iterator[_Chunk] | None = iter(chunks)
    error: Exception | None = None
    waiting: deque[tuple[_Chunk, _Worker | None]] = deque()
    with contextlib.closing(_Team(job, settings)) as team:
        while True:
            while rest is not None and len(waiting) < max(1, _IN_HAND * len(team.workers)):
                try:
                    chunk = next(rest)
                except StopIteration:
                    rest = None
                except Exception as found:  # what was read before it goes first
                    rest, error = None, found
                else:
                    waiting.append((chunk, team.give(chunk)))
            if not waiting:
                break
            chunk, worker = waiting.popleft()
            yield chunk, team.done_by(worker)
    if error is not None:
        raise error


class _Team:
    """Processes of one job. After the first failure of any there are none."""

    def __init__(self, job: str, settings: Any) -> None:
        self.workers: list[_Worker] = []
        self._owner, self._turn = os.getpid(), 0
        first = marshal.dumps((job, settings))
        try:
            for _ in range(count()):
                self.workers.append(_Worker())
                self.workers[-1].give(first)
        except (OSError, ValueError, EOFError):
            self.close()
        except BaseException:
            self.close()
            raise

    def give(self, chunk: Any) -> _Worker | None:
        """Has one of them begin; None where none does."""
        if not self.workers or len(told := marshal.dumps(chunk)) > _LARGEST:
            return None
        worker = self.workers[self._turn % len(self.workers)]
        self._turn += 1
        try:
            worker.give(told)
        except (OSError, ValueError, EOFError):
            self.close()
            return None
        return worker

    def done_by(self, worker: _Worker | None) -> Any:
        """What the process has made of the first of its chunks; None where it never will."""
        if worker is None or worker not in self.workers:
            return None
        try:
            return worker.answer()
        except (OSError, ValueError, EOFError, TypeError):
            self.close()
            return None

    def close(self) -> None:
        workers, self.workers = self.workers, []
        if os.getpid() == self._owner:  # a fork of this program has them not
            for worker in workers:
                worker.end()


class _Worker:
    """One process, and what it has said so far."""

    def __init__(self) -> None:
        import subprocess  # which a few hundred records have no need of

        root = str(Path(__file__).parents[2])
        # Isolated, without the packages of a site: it needs the standard library and this package.
        command = [sys.executable, "-I", "-S", "-B", "-c", _BEGINNING, root, str(os.getpid())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._said, self._greeted = bytearray(), False
        for pipe in (self._to, self._from):
            os.set_blocking(pipe, False)
            with contextlib.suppress(OSError):
                widen(pipe)

    def give(self, told: bytes) -> None:
        """Raises OSError or EOFError where the process takes nothing any more."""
        rest = memoryview(framed(told))
        until = time.monotonic() + _PATIENCE_S
        while rest:
            if self._ready(select.POLLOUT, until):
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self._to, rest) :]

    def answer(self) -> Any:
        """Raises OSError, EOFError or ValueError where there is none."""
        if not self._greeted and self._answer() != version():
            raise ValueError("the package is another one by now")
        self._greeted = True
        return self._answer()

    def _answer(self) -> Any:
        until = time.monotonic() + _PATIENCE_S
        while (size := whole(self._said)) is None:
            self._ready(0, until)
        found = marshal.loads(self._said[_HEAD:size])
        del self._said[:size]
        return found

    def _ready(self, to: int, until: float) -> bool:
        """Waits until there is something to read, which is read, or the process takes what is told: then True."""
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        if to:
            poll.register(self._to, to)
        events = dict(poll.poll(1e3 * max(0.0, until - time.monotonic())))
        if not events:
            raise TimeoutError("a process that does not answer")
        if self._from in events:
            with contextlib.suppress(BlockingIOError):
                if not (more := os.read(self._from, _PIPE_BYTES)):
                    raise EOFError
                self._said += more
        return self._to in events

    def end(self) -> None:
        """At once, whatever it does."""
        with contextlib.suppress(OSError):
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()


def version() -> str:
    """Of the package, as this process has loaded it."""
    return str(getattr(sys.modules["tilebook"], "__version__", ""))


_HEAD = 8


def framed(told: bytes) -> bytes:
    """A message as it goes through a pipe, its length before it."""
    return len(told).to_bytes(_HEAD, "little") + told


def whole(said: bytearray) -> int | None:
    """How much of this the first message is; None where it is not all there. Raises ValueError where it cannot be."""
    if len(said) < _HEAD:
        return None
    size = _HEAD + int.from_bytes(said[:_HEAD], "little")
    if size > _LONGEST_ANSWER:
        raise ValueError("a message of that length was never sent")
    return size if len(said) >= size else None


def widen(pipe: int) -> None:
    """Has a pipe take as much as a chunk has. Raises OSError where it cannot."""
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
