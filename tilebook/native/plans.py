"""A recorded call, as the extension repeats it."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch

from tilebook.replay import Plan

_NUMBERS = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5,
    torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip
"""PyTorch's own numbers of its dtypes."""

_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d"}
_MASK = (1 << 64) - 1


def translated(
    plan: Plan, arguments: int, places: Sequence[int | None], shapes: Sequence[tuple[int, ...] | None]
) -> tuple[Any, ...] | None:
    """The plan over PyTorch's arguments, or None where it has what the extension cannot do.

    arguments: how many PyTorch's op has. places: which of them each argument of ours is.
    shapes: of the outputs, which are allocated in these, contiguous; None for one that there is not.
    """

    def slot(number: int) -> int:
        place = places[number] if number < len(places) else arguments + number - len(places)
        if place is None:
            raise _Untranslatable
        return place

    made = [(tuple(make.args[0]), tuple(make.args[1]), _NUMBERS[make.keywords["dtype"]]) for make in plan.makers]
    for output, shape in zip(plan.outputs, [each for each in shapes if each is not None], strict=True):
        index = output - len(places)
        sizes, strides, dtype = made[index] if index >= 0 else ((), (), 0)
        if index < 0 or math.prod(sizes) != math.prod(shape) or strides != _contiguous(sizes):
            return None
        made[index] = (tuple(shape), _contiguous(shape), dtype)
    try:
        launches = [_launch(each, compiled, slot) for each, compiled in zip(plan.launches, plan.compiled, strict=True)]
    except _Untranslatable:
        return None
    outputs = iter(plan.outputs)
    return made, launches, [-1 if shape is None else slot(next(outputs)) for shape in shapes]


class _Untranslatable(Exception):
    """A launch has something besides addresses and numbers."""


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _launch(recorded: Any, compiled: Any, slot: Any) -> tuple[Any, ...]:
    _, grid, function, _, template, tensors, descriptors, structs = recorded
    meta = compiled.metadata
    plain = meta.num_ctas == 1 and not meta.launch_pdl and not meta.launch_cooperative_grid
    if descriptors or structs or not plain or meta.global_scratch_size or meta.profile_scratch_size:
        raise _Untranslatable
    addresses = dict(tensors)
    parameters = []
    for position, kind in enumerate(compiled.src.signature.values()):
        if kind == "constexpr":
            continue
        if not isinstance(kind, str) or kind.startswith(("tensordesc", "nvTmaDesc")):
            raise _Untranslatable
        if kind.startswith("*"):
            parameters.append((slot(addresses[position]), 0) if position in addresses else (-1, 0))
        else:
            parameters.append((-1, _bits(kind, template[position])))
    parameters += [(-1, 0)] * 2  # Triton's own: no memory for a kernel's descriptors, none for its profile
    if not _takes(function, len(parameters)):
        raise _Untranslatable
    return function, grid, 32 * meta.num_warps, meta.shared, parameters


def _bits(kind: str, number: Any) -> int:
    """What the kernel reads of a number, from its lowest byte on."""
    if kind in _FLOATS:
        return int.from_bytes(struct.pack(_FLOATS[kind], number), "little")
    if kind.lstrip("iu").isdigit():
        return int(number) & _MASK
    raise _Untranslatable


def _takes(function: int, count: int) -> bool:
    """Has the compiled kernel so many parameters? So that another Triton's way of calling is never guessed."""
    try:
        asked = ctypes.CDLL("libcuda.so.1").cuFuncGetParamInfo
    except (OSError, AttributeError):  # a driver older than CUDA 12.4
        return False
    asked.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()

    def there(index: int) -> bool:
        return bool(asked(function, index, ctypes.byref(offset), ctypes.byref(size)) == 0)

    return there(count - 1) and not there(count)
