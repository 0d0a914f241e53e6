"""Compiles candidates for any GPU, present or not, in processes that own none (`compiler.py`)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from tilebook import op as ops
from tilebook.device import Device
from tilebook.errors import CompilerError, TuningError
from tilebook.tuner.process.child import Child, ChildDied, ChildNotStarted, ChildTimedOut, Json

_MAX_WORKERS = 32  # each holds PyTorch and Triton, about 0.5 GB
_MAX_REASON = 500


@dataclass(frozen=True)
class Binary:
    """One kernel launch of a candidate.

    hash: of the machine code. launch: of what else the launch depends on: shape of the grid, run-time arguments, launch
    options. grid: programs. shared: bytes per program. registers, spills: registers and bytes of local memory a thread.
    """

    name: str
    hash: str
    grid: int
    shared: int
    registers: int
    spills: int
    warps: int
    stages: int
    launch: str = ""


@dataclass(frozen=True)
class Compiled:
    """A candidate's launches in order. `failure` is None, "compile_error", "compile_timeout", "out_of_resources",
    "spills" or "worker_died"; the classes that are about resources come with the binaries where there are any.
    """

    binaries: tuple[Binary, ...] = ()
    seconds: float = 0.0
    failure: str | None = None
    reason: str = ""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for two configs that run the same code in the same way; empty where nothing was compiled.

        It belongs to a version of Triton and ptxas, and says nothing of how the source is written: see `recheck`.
        """
        parts = [[each.hash, each.launch, each.grid, each.shared, each.warps] for each in self.binaries]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else ""

    def to_json(self) -> Json:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "binaries": tuple(Binary(**each) for each in data["binaries"])})


def check_cache() -> None:
    """Raises TuningError where Triton cannot keep what it compiles: every candidate would fail at that."""
    import triton

    folder = Path(triton.knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        wish = "set TRITON_CACHE_DIR to a folder that can"
        raise TuningError(f"Triton's cache {folder} cannot be written ({error.strerror}): {wish}") from None


def outcome(future: Future[Compiled]) -> Compiled:
    """What became of a compilation; a defect of the compile process is that candidate's failure, and no more.

    Raises ChildNotStarted where no process can start.
    """
    try:
        return future.result()
    except CompilerError as error:
        return Compiled((), 0.0, "compile_error", str(error).strip().splitlines()[-1][:_MAX_REASON])


class Compilers(Protocol):
    """What the session needs of a compile pool; a recorded sweep or a test can stand in for one."""

    @property
    def workers(self) -> int: ...

    def submit(
        self, op: str, implementation: str, problem_key: str, config: Mapping[str, ops.Value]
    ) -> Future[Compiled]: ...

    def wait(self, futures: Collection[Future[Compiled]], timeout_s: float) -> set[Future[Compiled]]:
        """Those of the futures that are done; waits up to `timeout_s` for the first."""


class CompilePool:
    """Compiles candidates for `device` in `workers` processes, each of them replaced when it hangs or dies.

    modules: imported by the processes first, for ops that live outside of `tilebook.kernels`.
    """

    def __init__(
        self, device: Device, workers: int | None = None, timeout_s: float = 60.0, modules: Sequence[str] = ()
    ) -> None:
        count = workers or min(os.cpu_count() or 1, _MAX_WORKERS)
        order = json.dumps({"device": dataclasses.asdict(device), "modules": list(modules)})
        # Interpreted kernels cannot be compiled, and a process that sees a GPU could put a context on it.
        env = {"TRITON_INTERPRET": None, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}
        self._timeout_s = timeout_s
        self._children = [
            Child("tilebook.tuner.process.compiler", [order], env, f"compile process {n}") for n in range(count)
        ]
        # The last one used is the next one used: few candidates in flight need few processes.
        self._idle: queue.LifoQueue[Child] = queue.LifoQueue()
        for child in reversed(self._children):
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(count, "tilebook-compile")
        self._unfinished: set[Future[Compiled]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def workers(self) -> int:
        return len(self._children)

    @property
    def pending(self) -> int:
        """Candidates submitted and not finished."""
        return len(self._unfinished)

    def start(self) -> None:
        """Starts every process now: they take seconds to import PyTorch, and do it side by side."""
        for child in self._children:
            child.start()

    def submit(
        self, op: str, implementation: str, problem_key: str, config: Mapping[str, ops.Value]
    ) -> Future[Compiled]:
        """Compiles one candidate. The future raises UsageError for names that do not exist, ChildNotStarted where no
        process can start, CompilerError for a defect of the compile process; all else is the result's `failure`.
        """
        request = {"op": op, "implementation": implementation, "problem": problem_key, "config": dict(config)}
        future = self._threads.submit(self._compile, request)
        with self._lock:
            self._unfinished.add(future)
        future.add_done_callback(self._finished)
        return future

    def wait(self, futures: Collection[Future[Compiled]], timeout_s: float) -> set[Future[Compiled]]:
        """Those of the futures that are done; waits up to `timeout_s` for the first."""
        return wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED).done

    def close(self) -> None:
        """Cancels what waits, kills what runs."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        while self._unfinished:  # more than once: a request on its way in may have started its process after a kill
            for child in self._children:
                child.kill()
            time.sleep(0.01)
        self._threads.shutdown(wait=True)
        for child in self._children:
            child.close()

    def _finished(self, future: Future[Compiled]) -> None:
        with self._lock:
            self._unfinished.discard(future)

    def _compile(self, request: Json) -> Compiled:
        child = self._idle.get()
        began = time.monotonic()
        try:
            if self._closed:
                raise CancelledError
            reply = child.request(request, self._timeout_s)
            if "error" not in reply:
                return _with_diagnostic(Compiled.from_json(reply), child.stderr)
            error = reply["error"]
            if error["type"] == ops.UsageError.__name__:
                raise ops.UsageError(error["text"])
            raise CompilerError(error["traceback"])
        except (ChildTimedOut, ChildDied) as error:
            if self._closed:
                raise CancelledError from None
            if isinstance(error, ChildNotStarted):
                raise
            failure = "compile_timeout" if isinstance(error, ChildTimedOut) else "worker_died"
            return Compiled((), time.monotonic() - began, failure, str(error))
        finally:
            self._idle.put(child)


def _with_diagnostic(compiled: Compiled, stderr: str) -> Compiled:
    """MLIR passes raise only that they failed; why stands on stderr."""
    if compiled.failure != "compile_error" or "PassManager::run failed" not in compiled.reason:
        return compiled
    found = re.search(r"error: *(.+)", stderr)
    return dataclasses.replace(compiled, reason=found[1].strip()[:_MAX_REASON]) if found else compiled
