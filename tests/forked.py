"""Python processes that begin as copies of one in which PyTorch is loaded: to load it takes seconds of a processor.

In `make test`, tests that use the fixture `forked` start theirs so, where they are alike, see `_alike`. Others, and all
of plain `pytest`, are processes as everybody starts them. A copy has its own pipes, environment, folder, session and
main module, is the child of the process that asked for it, and ends as Python does. What it lacks: its variables are
not in /proc/PID/environ, and its `sys.flags` are the source's.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import inspect
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_LOADED = {
    "1": ("torch", "numpy", "triton", "triton.experimental.gluon", "sqlalchemy.orm"),
    "0": ("torch", "sqlalchemy.orm", "alembic.command", "optuna", "tilebook.cli", "tilebook.tuner.process.compiler"),
}
"""What a source loads, with TRITON_INTERPRET and without."""

_PLAIN = {"-P": "safe", "-u": "unbuffered"}
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: children of a child that has ended become this process's
_HEAD = struct.Struct("q")
_OWN = ("PYTHONPATH", "PYTHONUNBUFFERED")
_ASKED = ("TILEBOOK", "TILEBOOK_TRITON", "TILEBOOK_PROFILE")


# --- the source, a process of its own ------------------------------------------------------------------------------


def _received(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    head, fds, *_ = socket.recv_fds(channel, _HEAD.size, 3)
    if not head:
        return None, []
    text = b""
    while len(text) < _HEAD.unpack(head)[0]:
        text += channel.recv(1 << 16)
    return json.loads(text), fds


def _serve(channel: socket.socket) -> dict[str, Any]:
    """Makes a copy for each order; returns, in the copy, what was ordered."""
    while True:
        order, fds = _received(channel)
        if order is None:
            os._exit(0)
        told, telling = os.pipe()
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            channel.close()
            os.close(told)
            _settle(order, fds)
            os.write(telling, _HEAD.pack(os.getpid()))
            os.close(telling)
            return order
        os.close(telling)
        os.waitpid(between, 0)
        channel.sendall(os.read(told, _HEAD.size) or _HEAD.pack(0))
        for fd in (*fds, told):
            os.close(fd)


def _settle(order: dict[str, Any], fds: list[int]) -> None:
    """Takes on what a process is given by whoever starts it."""
    while os.getppid() != order["parent"]:
        time.sleep(0.0002)
    if order["session"]:
        os.setsid()
    os.chdir(order["folder"])
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(order["environment"])


def _streams(unbuffered: bool) -> None:
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    how = {"write_through": True} if unbuffered else {}
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout.reconfigure(**how)
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]  # noqa: SIM115
        2, "w", closefd=False, errors="backslashreplace", buffering=1
    )


def _run(order: dict[str, Any], own: list[str]) -> None:
    """The copy's program, as the interpreter's main module."""
    _streams("unbuffered" in order["options"])
    if "faulthandler" in order["options"]:
        import faulthandler

        faulthandler.enable()
    if order["warnings"]:
        import warnings

        warnings._processoptions(order["warnings"])  # type: ignore[attr-defined]
    first = {"-c": "", "-m": os.getcwd(), "": os.path.dirname(os.path.realpath(order["what"]))}[order["how"]]
    here = [] if "safe" in order["options"] else [first]
    paths = order["environment"].get("PYTHONPATH", "")
    sys.path[:] = list(dict.fromkeys([*here, *(paths.split(os.pathsep) if paths else []), *own]))
    sys.path_importer_cache.clear()
    if any(order["environment"].get(name) for name in _ASKED):
        importlib.import_module("tilebook.autoload").load()  # as PyTorch does at the end of its import
    sys.orig_argv = order["command"]
    sys.argv = [order["how"] or order["what"], *order["arguments"]]
    if order["how"] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(order["what"], "<string>", "exec"), main.__dict__)
    else:
        import runpy

        if order["how"]:
            sys.modules.pop(order["what"], None)
            runpy.run_module(order["what"], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(order["what"], run_name="__main__")


def _to_its_end(program: Callable[[], None]) -> NoReturn:
    """Runs a program and ends as Python does, without taking apart what the source has loaded."""
    code: Any = 0
    try:
        program()
    except SystemExit as ended:
        code = ended.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if code and code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit((code or 0) & 0xFF)


def _be() -> None:
    before = set(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    own = [path for path in sys.path[1:] if path not in before]
    for name in _LOADED[sys.argv[2]]:
        importlib.import_module(name)
    if sys.argv[2] == "0":
        from tilebook import op

        op.ops()
    gc.collect()
    gc.freeze()
    order = _serve(socket.socket(fileno=int(sys.argv[1])))
    _to_its_end(lambda: _run(order, own))


# --- whoever starts processes ---------------------------------------------------------------------------------------


class _Source:
    def __init__(self, kind: str) -> None:
        self._turn = threading.Lock()
        self.environment = dict(os.environ)
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment.update(PYTHONPATH=os.pathsep.join(paths), TRITON_INTERPRET=kind)
        self._channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno()), kind]
            self._process = _Popen(command, env=self.environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        atexit.register(self._close)

    def _close(self) -> None:
        self._channel.close()  # at which the source ends
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)

    def copy(self, order: dict[str, Any], fds: list[int]) -> int:
        """The number of a new child of this process."""
        text = json.dumps(order).encode()
        libc = ctypes.CDLL(None)
        with self._turn:
            libc.prctl(_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._channel, [_HEAD.pack(len(text))], fds)
                self._channel.sendall(text)
                made: int = _HEAD.unpack(self._channel.recv(_HEAD.size, socket.MSG_WAITALL))[0]
            finally:
                libc.prctl(_SUBREAPER, 0, 0, 0, 0)
        if not made:
            raise OSError(f"no copy could be made to run {order['command']}")
        return made


_source = functools.cache(_Source)
_Popen = subprocess.Popen
_PARAMETERS = inspect.signature(_Popen._execute_child)  # type: ignore[attr-defined]


def _parsed(command: list[str]) -> dict[str, Any]:
    """Options, -c, -m or a file, what follows that, and arguments; nothing where there is what is not read here."""
    options: list[str] = []
    filters: list[str] = []
    rest = list(command[1:])
    while rest:
        match rest:
            case ["-P" | "-u", *_]:
                options.append(_PLAIN[rest.pop(0)])
            case ["-X", "faulthandler" as asked, *_]:
                options.append(asked)
                del rest[:2]
            case ["-W", asked, *_]:
                filters.append(asked)
                del rest[:2]
            case ["-c" | "-m" as how, what, *arguments]:
                return {"options": options, "warnings": filters, "how": how, "what": what, "arguments": arguments}
            case [program, *arguments] if program.endswith(".py"):
                return {"options": options, "warnings": filters, "how": "", "what": program, "arguments": arguments}
            case _:
                break
    return {}


def _alike(environment: dict[str, str], source: dict[str, str]) -> bool:
    """Would a process with this environment have loaded the same in the same way?"""

    def read(values: dict[str, str]) -> dict[str, str]:
        early = ("PYTHON", "OMP_", "OPENBLAS_", "MKL_", "LD_", "TORCH")
        return {name: value for name, value in values.items() if name.startswith(early) and name not in _OWN}

    return read(environment) == read(source)


class Popen(_Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` that copies where it can."""

    def _execute_child(self, *given: Any) -> None:
        asked = _PARAMETERS.bind(self, *given).arguments
        order, source = _ordered(asked)
        if source is None:
            super()._execute_child(*given)  # type: ignore[misc]
            return
        theirs = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        self.pid = source.copy(order, [number if fd == -1 else fd for number, fd in enumerate(theirs)])
        self._child_created = True
        ours = {asked["p2cwrite"], asked["c2pread"], asked["errread"]}
        nothing = getattr(self, "_devnull", None)
        made = {fd for fd, other in zip(theirs, ("p2cwrite", "c2pread", "errread"), strict=True) if asked[other] != -1}
        for fd in ({nothing} | made) - ours - {None, -1}:
            os.close(fd)
        self._closed_child_pipe_fds = True


def _ordered(asked: dict[str, Any]) -> tuple[dict[str, Any], _Source | None]:
    """What to tell a source, and which; none where the process must be one of its own."""
    command = asked["args"]
    plain = isinstance(command, list | tuple) and command and command[0] == sys.executable and not asked["shell"]
    if not plain or asked["preexec_fn"] or asked["pass_fds"] or asked["executable"] not in (None, command[0]):
        return {}, None
    parsed = _parsed([os.fspath(part) for part in command])
    environment = dict(os.environ if asked["env"] is None else asked["env"])
    kind = "1" if environment.get("TRITON_INTERPRET") == "1" else "0"
    if not parsed or not _alike(environment, dict(os.environ)):
        return {}, None
    order = {
        **parsed, "command": list(map(os.fspath, command)), "environment": environment,
        "folder": os.path.abspath(asked["cwd"] or os.getcwd()),
        "session": asked["start_new_session"], "parent": os.getpid(),
    }  # fmt: skip
    return order, _source(kind)


if __name__ == "__main__":
    _be()
