"""Child processes that can be killed: one JSON line to them, one JSON line back.

Compilers abort and kernels hang, so neither runs in the user's process. A child is `python -m some.module`, never a
re-import of the user's `__main__`; it lives in a session of its own, so that Ctrl-C reaches only the parent and so that
killing its process group takes what it started along. What left the group is known by a variable in its environment.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from tilebook.errors import TuningError
from tilebook.tuner.process.processes import has_exited, kill_group, kill_marked
from tilebook.variables import ASKED, PROBE, PROFILED, TRITON

Json = dict[str, Any]

_TICK_S = 0.2  # how often a silent child is checked for having died behind an inherited, still open pipe
_GRACE_S = 2.0  # for a child to leave by itself once its stdin is closed
_REAP_S = 3.5  # for a SIGKILLed child to vanish; one that hangs in a GPU driver may never do so
_MARK = "TILEBOOK_CHILD"  # names, in the environment of a child and all it starts, the process they belong to
_KEPT_STDERR = 1 << 18  # Triton prints the whole program below the one line that says what is wrong with it
_SHOWN_STDERR = 2_048
_MAX_REPLY = 64 << 20


class ChildError(TuningError):
    """A child did not answer."""


class ChildDied(ChildError):
    """It exited, crashed or answered with garbage. The text has how, and the end of its stderr."""


class ChildNotStarted(ChildDied):
    """It died before it was ready for its first request: the next one would die of the same."""


class ChildTimedOut(ChildError):
    """It took longer than allowed and was killed."""


class Child:
    """A process running `module`, which must call `serve`. Started by the first request, and again after every death.

    env: variables set for the child, or removed where the value is None.
    start_timeout_s: how long importing its modules may take; a request's own time starts when the child is ready.
    """

    def __init__(
        self,
        module: str,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        name: str = "",
        start_timeout_s: float = 180.0,
    ) -> None:
        self.name = name or module
        self.respawns = 0
        self._command = [sys.executable, "-P", "-u", "-X", "faulthandler", "-m", module, *args]
        self._env = dict(env or {})
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = b""
        self._spawned = 0
        self._asked = 0  # requests sent to this process; each carries its number and so must its reply
        self._ready = False
        self._replies = bytearray()
        self._stderr = bytearray()
        self._turn = threading.Lock()  # held by the request under way
        self._guard = threading.Lock()  # held while the process is made, signalled or reaped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        with self._guard:
            return self._process is not None and not has_exited(self._process)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def stderr(self) -> str:
        """The end of what the child has written to stderr since the last request began."""
        return self._stderr.decode(errors="replace")

    def start(self) -> None:
        """Starts the process if there is none, and does not wait for it."""
        with self._guard:
            if self._process is not None:
                return
            name = uuid.uuid4().hex
            self._mark = f"{_MARK}={name}".encode()
            self._process = _spawn(self._command, _environment({**self._env, _MARK: name}))
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
            self._asked, self._ready = 0, False
            self._replies.clear()
            self._stderr.clear()
            self.respawns = self._spawned
            self._spawned += 1

    def request(self, message: Json, timeout_s: float) -> Json:
        """Sends `message` and returns the reply.

        Raises ChildTimedOut after `timeout_s` and ChildDied where the child died; the whole process group is gone by
        then, and the next request starts a new process. An exception in the child's handler is a reply:
        {"error": {"type", "text", "traceback"}}.
        """
        text = json.dumps(message)
        with self._turn:
            if self._process is not None and has_exited(self._process):
                self._reap()
            self.start()
            process = self._process
            assert process is not None
            try:
                return self._converse(process, text, timeout_s)
            except BaseException:
                # Whatever it was, an interrupt included, the child is out of step with us now.
                self._reap()
                raise

    def kill(self) -> None:
        """Kills the process group; safe while another thread waits in `request`, which then raises ChildDied."""
        with self._guard:
            if self._process is not None:
                kill_group(self._process)

    def close(self) -> None:
        """Ends the process: at once where a request is under way, else with a moment's grace."""
        if not self._turn.acquire(blocking=False):
            self.kill()
            self._turn.acquire()
        try:
            if self._process is not None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                deadline = time.monotonic() + _GRACE_S
                while not has_exited(self._process) and time.monotonic() < deadline:
                    time.sleep(0.01)
                self._reap()
        finally:
            self._turn.release()

    def _converse(self, process: subprocess.Popen[bytes], text: str, timeout_s: float) -> Json:
        while not self._ready:
            # Until the child has taken its stdout from the libraries it imports, theirs may be on it.
            line = self._line(process, b"", self._start_timeout_s)
            self._ready = line.strip() == _READY
        self._asked += 1
        self._replies.clear()
        self._stderr.clear()
        line = self._line(process, f"[{self._asked},{text}]\n".encode(), timeout_s)
        try:
            number, reply = json.loads(line)
            if number != self._asked or not isinstance(reply, dict):
                raise ValueError
        except (ValueError, TypeError, RecursionError):
            raise ChildDied(f"{self.name} was killed: it replied {line[:200]!r}") from None
        return reply

    def _line(self, process: subprocess.Popen[bytes], outgoing: bytes, timeout_s: float) -> bytes:
        """Sends `outgoing` and returns the child's next line, draining its stderr meanwhile."""
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            if outgoing:
                selector.register(process.stdin, selectors.EVENT_WRITE)
            gone = False
            while True:
                end = -1 if outgoing else self._replies.find(b"\n")
                if end >= 0:
                    line = bytes(self._replies[:end])
                    del self._replies[: end + 1]
                    return line
                if gone:
                    raise self._died(process)
                if len(self._replies) > _MAX_REPLY:
                    raise ChildDied(f"{self.name} was killed: its reply passed {_MAX_REPLY >> 20} MiB")
                left = deadline - time.monotonic()
                if left <= 0:
                    what = "did not answer" if self._ready else "was not ready"
                    raise ChildTimedOut(f"{self.name} {what} within {timeout_s:g} s")
                exited = has_exited(process)  # asked before reading, so that its last words are read below
                for key, _ in selector.select(0 if exited else min(left, _TICK_S)):
                    if key.fileobj is process.stdin:
                        outgoing = _write(key.fd, outgoing)
                        if not outgoing:
                            selector.unregister(process.stdin)
                    elif not self._read(key.fd, self._stderr if key.fileobj is process.stderr else self._replies):
                        selector.unregister(key.fileobj)
                        exited = exited or key.fileobj is process.stdout
                if exited:
                    while self._read(process.stdout.fileno(), self._replies):
                        pass
                    gone, outgoing = True, b""

    def _read(self, fd: int, into: bytearray) -> bool:
        try:
            chunk = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        into += chunk
        if into is self._stderr:
            del into[:-_KEPT_STDERR]
        return bool(chunk)

    def _died(self, process: subprocess.Popen[bytes]) -> ChildDied:
        assert process.stderr is not None
        deadline = time.monotonic() + _GRACE_S
        while not has_exited(process) and time.monotonic() < deadline:
            time.sleep(0.01)  # its stdout is closed; a core dump may take a moment
        while self._read(process.stderr.fileno(), self._stderr):
            pass
        tail = self.stderr.strip()[-_SHOWN_STDERR:]
        kind = ChildDied if self._ready else ChildNotStarted
        return kind(f"{self.name} {self._reap()}" + (f"; the end of its stderr:\n{tail}" if tail else ""))

    def _reap(self) -> str:
        """Kills what is left of the child and of what it started, waits for the child, and says how it ended."""
        with self._guard:
            process, self._process = self._process, None
            if process is None:
                return "was closed"
            # The group goes while the dead child is still there to hold its number: no stranger can get the signal.
            kill_group(process)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_S)
            kill_marked(self._mark)
            for pipe in (process.stdin, process.stdout, process.stderr):
                assert pipe is not None
                with suppress(OSError):
                    pipe.close()
        code = process.returncode
        if code is None:
            return "cannot be killed"
        if code >= 0:
            return f"exited with code {code}"
        with suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
        return f"died of signal {-code}"


def serve(handle: Callable[[Json], Json]) -> NoReturn:
    """The child's side: answers requests until the parent closes the pipe or dies.

    Replies travel on a private copy of stdout; stdout itself then means stderr, so that what libraries print cannot
    corrupt them, and stdin is empty.
    """
    _adopt_and_die_with_parent()
    served_by = os.getpid()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    replies.write(b"\n" + _READY + b"\n")
    replies.flush()
    for line in requests:
        number, message = json.loads(line)
        try:
            text = json.dumps(handle(message))
        except Exception as error:
            trace = "".join(traceback.format_exception(error))[-8_000:]
            text = json.dumps({"error": {"type": type(error).__name__, "text": str(error), "traceback": trace}})
        if os.getpid() != served_by:  # the handler forked, and this is the copy: it has nothing to say
            os._exit(0)
        # A parent that is gone cannot be told so.
        with suppress(BrokenPipeError):
            replies.write(f"[{number},{text}]\n".encode())
            replies.flush()
    # Not sys.exit: a library's threads or exit handlers could hang, and nobody waits for them.
    os._exit(0)


_READY = b"[0,{}]"


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Ours with `changes`, and a PYTHONPATH under which the child imports what we would. It runs plain PyTorch."""
    here = str(Path(__file__).parents[3])
    paths = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    if here not in paths:
        paths.insert(0, here)
    plain = dict.fromkeys((ASKED, PROBE, PROFILED, TRITON))
    values: dict[str, str | None] = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **plain, **changes}
    return {name: value for name, value in values.items() if value is not None}


def _write(fd: int, data: bytes) -> bytes:
    """Writes what the pipe takes and returns the rest; none, where nobody reads it any more."""
    try:
        return data[os.write(fd, data[: 1 << 16]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


Order = tuple[list[str], dict[str, str], "Future[subprocess.Popen[bytes]]"]


@functools.cache
def _spawner() -> queue.SimpleQueue[Order]:
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def work() -> None:
        while True:
            command, env, made = orders.get()
            pipe = subprocess.PIPE
            try:
                made.set_result(
                    subprocess.Popen(
                        command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=env, start_new_session=True
                    )
                )
            except Exception as error:
                made.set_exception(error)

    threading.Thread(target=work, name="tilebook-spawner", daemon=True).start()
    return orders


os.register_at_fork(after_in_child=_spawner.cache_clear)


def _spawn(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a process from the one thread that lives as long as this process.

    PR_SET_PDEATHSIG goes off when the thread that forked the child ends, not when the process does.
    """
    made: Future[subprocess.Popen[bytes]] = Future()
    _spawner().put((command, env, made))
    return made.result()


def _adopt_and_die_with_parent() -> None:
    """A child busy in a hung call does not see its stdin close; Linux can end it with its parent.

    And it can make the child, not init, the parent of what its own children leave behind.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig, pr_set_child_subreaper = 1, 36
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        libc.prctl(pr_set_child_subreaper, 1, 0, 0, 0)
