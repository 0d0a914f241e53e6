"""Repeats what a launcher did, without the launcher: allocate, then start the compiled kernels.

A launcher called again with arguments of the same shapes, strides, dtypes and alignment does the same again, but for
the addresses. Recorded once, a call needs neither its Python code nor Triton's, which together cost several times what
starting a compiled kernel does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tilebook.launch import intercepted

_ALLOCATORS = frozenset(
    {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided}
)

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
        elif getattr(func, "__name__", "") in ("__setitem__", "set_", "resize_"):
            self.faithful = False
        return result


class Plan:
    """The allocations and launches of one call, to be repeated with other tensors of the same description."""

    __slots__ = ("_launches", "_makers", "_outputs")

    def __init__(self, makers: Sequence[Any], launches: Sequence[Any], outputs: Sequence[int]) -> None:
        self._makers, self._launches, self._outputs = makers, launches, outputs

    def __call__(self, args: Sequence[Any]) -> Outputs:
        slots = list(args)
        empty = torch.empty_strided
        for size, stride, dtype, device in self._makers:
            slots.append(empty(size, stride, dtype=dtype, device=device))
        for runner, template, tensors, descriptors in self._launches:
            full = template.copy()
            for position, slot in tensors:
                full[position] = slots[slot]
            for position, slot, describe in descriptors:
                full[position] = describe(slots[slot])
            runner(*full)
        return tuple([slots[slot] for slot in self._outputs])


def _describer(descriptor: Any) -> Callable[[torch.Tensor], Any]:
    kind, shape, strides = type(descriptor), descriptor.shape, descriptor.strides
    block, padding = descriptor.block_shape, getattr(descriptor, "padding", "zero")
    return lambda base: kind(base, shape, strides, block, padding)


def record(call: Callable[..., Outputs], args: Sequence[Any]) -> tuple[Outputs, Plan | None]:
    """Runs `call(*args)` and returns its outputs, with a plan that repeats it, or None where it cannot be repeated."""
    started: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def start(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], meta: dict[str, Any]) -> None:
        # The plain launch returns what it compiled; in the interpreter there is no such thing.
        compiled = kernel[grid](*given, **meta)
        names = getattr(kernel, "arg_names", ())
        started.append((compiled, grid, (*given, *(meta[name] for name in names[len(given) :])), meta))

    watch = _Watch()
    with watch, intercepted(start):
        outputs = call(*args)
    try:
        return outputs, _plan(watch, started, args, outputs)
    except _Unrepeatable:
        return outputs, None


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
    for compiled, grid, full, _ in started:
        if compiled is None or not hasattr(compiled, "asm"):
            raise _Unrepeatable
        template, tensors, descriptors = list(full), [], []
        for position, value in enumerate(full):
            if isinstance(value, torch.Tensor):
                tensors.append((position, slot_of(value)))
            elif hasattr(value, "block_shape"):
                descriptors.append((position, slot_of(value.base), _describer(value)))
            else:
                continue
            template[position] = None
        launches.append((compiled[(*grid, 1, 1)[:3]], template, tensors, descriptors))
    makers = [(x.shape, x.stride(), x.dtype, x.device) for x in watch.made]
    return Plan(makers, launches, [slot_of(output) for output in outputs])
