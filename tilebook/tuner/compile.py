"""Compiles candidates for any GPU, present or not, in processes that own none.

Run as a module this is such a process: it tells Triton that it has the wanted GPU, runs an implementation's launcher on
meta tensors, and compiles each kernel that it would start. The binaries stay in Triton's disk cache under the keys that
a machine with that GPU computes, so its worker loads instead of compiling.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.overrides import TorchFunctionMode

from tilebook import device as devices
from tilebook import op as ops
from tilebook.device import Device
from tilebook.launch import intercepted
from tilebook.tuner import binary
from tilebook.tuner.child import Child, ChildDied, ChildNotStarted, ChildTimedOut, Json, serve

MAX_SPILLS = 512  # bytes of local memory per thread; below this spills are recorded, above it they cost too much to try
MAX_TENSOR_MEMORY = 512  # columns of a Blackwell SM
_MAX_WORKERS = 32  # each holds PyTorch and Triton, about 0.5 GB
_MAX_REASON = 500


class CompilerError(Exception):
    """A compile process failed at something that is no candidate's fault."""


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
        """Equal for two configs that run the same code in the same way; empty where nothing was compiled."""
        parts = [[each.hash, each.launch, each.grid, each.shared, each.warps] for each in self.binaries]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else ""

    def to_json(self) -> Json:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "binaries": tuple(Binary(**each) for each in data["binaries"])})


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
        self._children = [Child(__name__, [order], env, f"compile process {n}") for n in range(count)]
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


# From here on: the compile process.


class _Rejected(Exception):
    """The candidate needs more than the device has; known before its code was generated."""


class _Driver:
    """Answers what Triton asks a GPU's driver at compile time."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _pose_as(device: Device) -> None:
    """Makes Triton, and whoever asks `tilebook.device.current`, believe that this process has `device`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    arch: int | str = device.capability if device.backend == "cuda" else device.arch
    target = GPUTarget(device.backend, arch, device.warp_size)
    triton.runtime.driver.set_active(_Driver(target))
    devices.current.cache_clear()
    setattr(devices, "current", lambda index=0: device)  # noqa: B010 (mypy rejects the plain assignment)

    # Shared memory is known before code is generated, and the code of hopeless candidates takes longest: 7 s and more.
    backend = type(make_backend(target))
    add_stages = backend.add_stages

    def add_checked_stages(self: Any, stages: dict[str, Any], options: Any, language: Any) -> None:
        add_stages(self, stages, options, language)
        for name in {"ptx", "amdgcn"} & set(stages):
            stages[name] = _checking(stages[name], device)

    backend.add_stages = add_checked_stages


def _checking(stage: Any, device: Device) -> Any:
    def checked(source: Any, metadata: dict[str, Any]) -> Any:
        if metadata["shared"] > device.shared_per_block:
            raise _Rejected(_too_much_shared(metadata["shared"], device))
        return stage(source, metadata)

    return checked


def _too_much_shared(shared: int, device: Device) -> str:
    return f"shared memory {shared} B > {device.shared_per_block} B"


class _Light(TorchFunctionMode):
    """Inside it `torch.empty_like` of a contiguous meta tensor asks nobody for the strides: PyTorch would load its
    compiler for that, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.empty_like and options.keys() <= {"dtype"} and args[0].is_meta and args[0].is_contiguous():
            return torch.empty(args[0].shape, dtype=options.get("dtype", args[0].dtype), device="meta")
        return func(*args, **options)


def compile_here(
    device: Device, op: str, implementation: str, problem_key: str, config: Mapping[str, ops.Value]
) -> Compiled:
    """Compiles one candidate in this process, which must already pose as `device`."""
    chosen = ops.get(op)
    if implementation not in chosen.implementations:
        raise ops.UsageError(f"{op} has no implementation {implementation!r}")
    problem = chosen.problem.from_key(problem_key)
    began = time.monotonic()
    binaries: list[Binary] = []

    def collect(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        binaries.append(_binary(compiled, grid, args, meta))
        if getattr(compiled.metadata, "tmem_size", 0) > MAX_TENSOR_MEMORY:
            raise _Rejected(f"tensor memory {compiled.metadata.tmem_size} columns > {MAX_TENSOR_MEMORY}")

    failure: tuple[str | None, str]
    try:
        try:
            with _Light():
                inputs = problem.inputs("meta", 0)
        except Exception as error:
            raise RuntimeError(f"inputs on the meta device: {_gist(error)}") from error
        with intercepted(collect), _Light(), torch.no_grad():
            chosen.implementations[implementation](*inputs, config=ops.Config(config))
        failure = _limits(binaries, device) if binaries else ("compile_error", "the launcher started no kernel")
    except _Rejected as error:
        failure = "out_of_resources", str(error)
    except Exception as error:
        failure = "compile_error", _gist(error)
    return Compiled(tuple(binaries), time.monotonic() - began, *failure)


def _binary(compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: Mapping[str, Any]) -> Binary:
    facts = binary.facts(compiled.asm)
    metadata = compiled.metadata
    # Constexprs are in the code already. Two of these differ, and the same code runs differently.
    options = [getattr(metadata, name, None) for name in ("num_ctas", "launch_cooperative_grid", "launch_pdl")]
    launch = json.dumps([list(grid), [_shown(arg) for arg in args], options])
    return Binary(
        metadata.name,
        facts.code,
        math.prod(grid),
        metadata.shared,
        facts.registers,
        facts.spills,
        metadata.num_warps,
        metadata.num_stages,
        hashlib.sha256(launch.encode()).hexdigest(),
    )


def _shown(argument: Any) -> str:
    """What of a run-time argument can differ between two configs."""
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype}{tuple(argument.shape)}{argument.stride()}"
    if hasattr(argument, "base"):  # a host-side tensor descriptor
        return f"{_shown(argument.base)}{argument.shape}{argument.strides}{argument.block_shape}"
    return repr(argument)


def _limits(binaries: Sequence[Binary], device: Device) -> tuple[str | None, str]:
    """Why the device would refuse these launches, or why they are not worth trying."""
    for each in binaries:
        if each.shared > device.shared_per_block:
            return "out_of_resources", f"{each.name}: {_too_much_shared(each.shared, device)}"
        needed = block_registers(each, device)
        if needed > device.registers_per_sm:
            return "out_of_resources", f"{each.name}: {needed} registers > {device.registers_per_sm}"
    for each in binaries:
        if each.spills > MAX_SPILLS:
            return "spills", f"{each.name}: {each.spills} B of local memory per thread > {MAX_SPILLS} B"
    return None, ""


def block_registers(kernel: Binary, device: Device) -> int:
    """Registers that one program takes: handed out to a warp eight per thread at a time."""
    return -(-kernel.registers // 8) * 8 * device.warp_size * kernel.warps


def _gist(error: BaseException) -> str:
    """One line that says what went wrong: compilers bury it under the program text or above a command line."""
    while error.__cause__ is not None and getattr(error, "error_message", error) is None:
        error = error.__cause__  # Triton's frame around a callee's error: it only says where
    text = str(getattr(error, "error_message", None) or error)
    lines = [line.strip() for line in text.splitlines() if line.strip(" `^-")]
    telling = [line for line in lines if re.search(r"\b(error|fatal|failed|exceeds|unsupported)\b", line, re.I)]
    # "Internal Triton PTX codegen error" and the like only announce the compiler's own words.
    telling = [line for line in telling if not line.startswith("Internal Triton")] or telling
    return f"{type(error).__name__}: {(telling or lines or ['no text'])[0]}"[:_MAX_REASON]


def _warm_up() -> None:
    """Compiles a kernel that does nothing: the first takes as long as Triton's compiler takes to load, and that is no
    candidate's time."""
    import triton

    @triton.jit  # type: ignore[misc, unused-ignore]
    def nothing(x):  # type: ignore[no-untyped-def]
        pass

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True  # from its cache it would come without the compiler
        nothing.warmup(torch.empty(1, device="meta"), grid=(1,))


def _main(order: str) -> None:
    wanted = json.loads(order)
    device = Device(**wanted["device"])
    _pose_as(device)
    for module in wanted["modules"]:
        importlib.import_module(module)
    ops.ops()
    _warm_up()

    def handle(request: Json) -> Json:
        return compile_here(
            device, request["op"], request["implementation"], request["problem"], request["config"]
        ).to_json()

    serve(handle)


if __name__ == "__main__":
    _main(sys.argv[1])
