"""The compile process: compiles candidates for any GPU, present or not, and owns none.

It tells Triton that it has the wanted GPU, runs an implementation's launcher on meta tensors, and compiles each kernel
that it would start. The binaries stay in Triton's disk cache under the keys that a machine with that GPU computes, so
that its worker loads instead of compiling. Started as `python -m tilebook.tuner.process.compiler ORDER`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tilebook import device as devices
from tilebook import op as ops
from tilebook.device import Device
from tilebook.launch import intercepted
from tilebook.occupancy import program_registers
from tilebook.tuner.process import binary
from tilebook.tuner.process.child import Json, serve
from tilebook.tuner.process.compile import Binary, Compiled

MAX_SPILLS = 512  # bytes of local memory per thread; below this spills are recorded, above it they cost too much to try
MAX_TENSOR_MEMORY = 512  # columns of a Blackwell SM
_MAX_REASON = 500


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
    """Makes Triton believe that this process has `device`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    arch: int | str = device.capability if device.backend == "cuda" else device.arch
    target = GPUTarget(device.backend, arch, device.warp_size)
    triton.runtime.driver.set_active(_Driver(target))

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
    """Compiles one candidate in this process, in which Triton must already believe that it has `device`.

    Somebody else's kernel whose package cannot be imported without a GPU is left for the process that has one. All its
    recorded calls are compiled, since all are verified, and their numbers may be of another kind to Triton.
    """
    try:
        chosen = ops.get(op)
    except ops.UsageError as missing:
        if ":" not in op:
            raise
        return Compiled(reason=str(missing))
    if implementation not in chosen.implementations:
        raise ops.UsageError(f"{op} has no implementation {implementation!r}")
    problem = chosen.problem.from_key(problem_key)
    began = time.monotonic()
    binaries: list[Binary] = []

    def collect(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        binaries.append(_binary(compiled, grid, _passed(kernel, args, meta)))
        _starter(compiled, device)
        if getattr(compiled.metadata, "tmem_size", 0) > MAX_TENSOR_MEMORY:
            raise _Rejected(f"tensor memory {compiled.metadata.tmem_size} columns > {MAX_TENSOR_MEMORY}")

    failure: tuple[str | None, str]
    try:
        try:
            with _Light():
                inputs = problem.inputs("meta", 0)
        except Exception as error:
            raise RuntimeError(f"inputs on the meta device: {_gist(error)}") from error
        with devices.posing_as(device), _Light(), torch.no_grad():
            with intercepted(collect):
                chosen.implementations[implementation](*inputs, config=ops.Config(config))
            with intercepted(lambda kernel, grid, args, meta: kernel.warmup(*args, grid=grid, **meta)):
                for near in problem.neighbours() if chosen.answers else ():
                    chosen.implementations[implementation](*near.inputs("meta", 0), config=ops.Config(config))
        failure = _limits(binaries, device) if binaries else ("compile_error", "the launcher started no kernel")
    except _Rejected as error:
        failure = "out_of_resources", str(error)
    except Exception as error:
        failure = "compile_error", _gist(error)
    return Compiled(tuple(binaries), time.monotonic() - began, *failure)


def _starter(compiled: Any, device: Device) -> None:
    """Has C code compiled, too, which Triton up to 3.6 makes to start each kernel and keeps beside it: for 0.1 to 0.3 s
    the first call would wait for it."""
    driver = importlib.import_module(f"triton.backends.{'nvidia' if device.backend == 'cuda' else 'amd'}.driver")
    launcher = getattr(driver, "CudaLauncher", None) or getattr(driver, "HIPLauncher", None)
    if launcher is not None and hasattr(driver, "make_launcher"):
        with suppress(Exception):  # no driver of a GPU here, no C compiler
            launcher(compiled.src, compiled.metadata)


def _passed(kernel: Any, args: tuple[Any, ...], meta: Mapping[str, Any]) -> Iterator[Any]:
    """What a launch passes at run time, in order. A struct's fields count as if each were an argument of its own, and
    what the compiler makes a constant of does not: how arguments are written down is no part of what runs."""
    import triton.language as tl

    def flat(value: Any) -> Iterator[Any]:
        if isinstance(value, tuple):
            for each in value:
                yield from flat(each)
        elif value is not None and not isinstance(value, tl.constexpr):
            yield value

    named = {**meta, **dict(zip(kernel.arg_names, args, strict=False))}
    for parameter in kernel.params:
        if not parameter.is_constexpr and parameter.name in named:
            yield from flat(named[parameter.name])


def _binary(compiled: Any, grid: tuple[int, ...], passed: Iterable[Any]) -> Binary:
    facts = binary.facts(compiled.asm)
    metadata = compiled.metadata
    # Constexprs are in the code already. Two of these differ, and the same code runs differently.
    options = [getattr(metadata, name, None) for name in ("num_ctas", "launch_cooperative_grid", "launch_pdl")]
    launch = json.dumps([list(grid), [_shown(each) for each in passed], options])
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
        needed = program_registers(each.registers, each.warps, device)
        if needed > device.registers_per_sm:
            return "out_of_resources", f"{each.name}: {needed} registers > {device.registers_per_sm}"
    for each in binaries:
        if each.spills > MAX_SPILLS:
            return "spills", f"{each.name}: {each.spills} B of local memory per thread > {MAX_SPILLS} B"
    return None, ""


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
    ops.recorded()  # before: some packages ask at their import what GPU there is, and fail at half an answer
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
