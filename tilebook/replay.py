"""Repeats what a launcher did, without the launcher: allocate, then start the compiled kernels.

A launcher called again with arguments of the same shapes, strides, dtypes and alignment does the same again, but for
the addresses. Recorded once, a call needs neither its Python code nor Triton's, which together cost several times what
starting a compiled kernel does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tilebook import launch

_ALLOCATORS = frozenset(
    {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
)

_DESCRIBING = frozenset(
    {
        "__get__", "__len__", "data_ptr", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
        "is_floating_point", "nelement", "numel", "size", "storage_offset", "stride",
    }
)  # fmt: skip
"""Functions that look at no number of a tensor; `__get__` is every property."""

Outputs = tuple[torch.Tensor, ...]


class _Unrepeatable(Exception):
    """The launcher does something that is not an allocation or a launch."""


class _Watch(TorchFunctionMode):
    """Notes what is allocated, and whether anything else touches a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self.faithful = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATORS:
            self.made.append(result)
        elif isinstance(result, torch.Tensor):
            # `x.contiguous()` of a contiguous tensor is the tensor; every other way to a tensor computes something.
            self.faithful &= func is torch.Tensor.contiguous and result is args[0]
        elif getattr(func, "__name__", "") not in _DESCRIBING:
            self.faithful = False  # it read a number, which another call may not have, or changed one
        return result


class Plan:
    """The allocations and launches of one call, to be repeated with other tensors of the same description.

    Slots are numbers of tensors: the arguments, then what is made. `compiled` are the kernels as Triton has them.
    """

    __slots__ = ("_current_gpu", "_gpu", "_stream", "compiled", "launches", "makers", "outputs")

    def __init__(
        self, gpu: int, makers: Sequence[Any], launches: Sequence[Any], outputs: Sequence[int], compiled: Sequence[Any]
    ) -> None:
        from triton.runtime import driver

        self._gpu, self.makers, self.launches, self.outputs, self.compiled = gpu, makers, launches, outputs, compiled
        self._current_gpu, self._stream = driver.active.get_current_device, driver.active.get_current_stream

    def __call__(self, args: Sequence[Any]) -> Outputs:
        if self._current_gpu() != self._gpu:
            with torch.cuda.device(self._gpu):
                return self._repeat(args)
        return self._repeat(args)

    def _repeat(self, args: Sequence[Any]) -> Outputs:
        slots = [*args, *[make() for make in self.makers]]
        stream = self._stream(self._gpu)
        for start, (x, y, z), function, metadata, template, tensors, descriptors, structs in self.launches:
            full = template.copy()
            for position, slot in tensors:
                full[position] = slots[slot].data_ptr()  # an address spares the launcher asking the driver about it
            for position, slot, describe in descriptors:
                full[position] = describe(slots[slot])
            for position, fields, places in structs:
                filled = fields.copy()
                for field, slot in places:
                    filled[field] = slots[slot].data_ptr()
                full[position] = tuple(filled)
            # What Triton's own launch comes down to once it has found the compiled kernel; the Nones are its hooks.
            start(x, y, z, stream, function, metadata, None, None, None, *full)
        return tuple([slots[slot] for slot in self.outputs])


def _describer(descriptor: Any) -> Callable[[torch.Tensor], Any]:
    """Makes the same descriptor of another tensor, without checking again what held for the first."""
    kind, fields = type(descriptor), {name: value for name, value in vars(descriptor).items() if name != "base"}

    def describe(base: torch.Tensor) -> Any:
        made = object.__new__(kind)
        made.__dict__.update(fields)
        made.base = base
        return made

    return describe


def record(call: Callable[..., Outputs], args: Sequence[Any]) -> tuple[Outputs, Plan | None]:
    """Runs `call(*args)` and returns its outputs, with a plan that repeats it, or None where it cannot be repeated."""
    started: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
    args = _apart(args)

    def start(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], meta: dict[str, Any]) -> None:
        compiled = launch.start(kernel, grid, given, meta)
        names = getattr(kernel, "arg_names", ())
        started.append((compiled, grid, (*given, *(meta[name] for name in names[len(given) :]))))

    watch = _Watch()
    with watch, launch.intercepted(start):
        outputs = call(*args)
    try:
        return outputs, _plan(watch, started, args, outputs)
    except _Unrepeatable:
        return outputs, None


def _apart(args: Sequence[Any]) -> list[Any]:
    """The arguments, of which a tensor that is given twice is two: the next call may give two that differ."""
    seen: set[int] = set()
    found = []
    for each in args:
        found.append(each.detach() if isinstance(each, torch.Tensor) and id(each) in seen else each)
        seen.add(id(each))
    return found


def _plan(watch: _Watch, started: Sequence[Any], args: Sequence[Any], outputs: Outputs) -> Plan:
    if not watch.faithful or not started:
        raise _Unrepeatable
    known: list[Any] = [*args, *watch.made]
    slots: dict[int, int] = {
        id(each): slot for slot, each in reversed(list(enumerate(known))) if isinstance(each, torch.Tensor)
    }

    def slot_of(tensor: torch.Tensor) -> int:
        if id(tensor) not in slots:
            raise _Unrepeatable
        return slots[id(tensor)]

    launches = []
    for compiled, grid, full in started:
        if compiled is None or not hasattr(compiled, "asm"):
            raise _Unrepeatable
        template, tensors, descriptors, structs = list(full), [], [], []
        for position, value in enumerate(full):
            if isinstance(value, torch.Tensor):
                tensors.append((position, slot_of(value)))
            elif hasattr(value, "block_shape"):
                descriptors.append((position, slot_of(value.base), _describer(value)))
            elif isinstance(value, tuple):
                places = [(field, slot_of(x)) for field, x in enumerate(value) if isinstance(x, torch.Tensor)]
                if any(_has_tensors(x) for x in value):
                    raise _Unrepeatable
                if not places:
                    continue
                fields = [None if isinstance(x, torch.Tensor) else x for x in value]
                structs.append((position, fields, places))
            else:
                continue
            template[position] = None
        size = (*grid, 1, 1)[:3]
        run = compiled.run
        if getattr(getattr(compiled, "metadata", None), "global_scratch_size", 0):
            run = functools.partial(launch.with_scratch, run)  # Triton's part of the launch asks for it
        launches.append(
            (run, size, compiled.function, compiled.packed_metadata, template, tensors, descriptors, structs)
        )
    makers = [_maker(x) for x in watch.made]
    compiled = [each for each, _, _ in started]
    return Plan(args[0].get_device(), makers, launches, [slot_of(output) for output in outputs], compiled)


def _has_tensors(value: Any) -> bool:
    """Is it a struct that holds tensors, which nobody looks for inside of another?"""
    return isinstance(value, tuple) and any(isinstance(x, torch.Tensor) or _has_tensors(x) for x in value)


def _maker(made: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Allocates another one. It keeps no tensor as a model: that might lie in the memory of a graph, for ever."""
    return functools.partial(torch.empty_strided, made.shape, made.stride(), dtype=made.dtype, device=made.device)
