"""A recorded call, as the extension repeats it."""

from __future__ import annotations

import ctypes
import inspect
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tilebook.replay import Plan

_NUMBERS = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5,
    torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15, torch.uint16: 27, torch.uint32: 28,
    torch.uint64: 29,
}  # fmt: skip
"""PyTorch's own numbers of its dtypes."""


def number_of(dtype: torch.dtype) -> int:
    """PyTorch's own number of a dtype, which an op that is asked about has in its place."""
    return _NUMBERS[dtype]


_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d"}
_MASK = (1 << 64) - 1
_MAP = 128
"""Bytes of a CUtensorMap."""

_NOT_THERE, _NUMBER, _THEIRS = (-1, 0), -2, -3


class Ours(NamedTuple):
    """An output that is one of ours, in their order, with its shape and strides in PyTorch's place.

    in_memory: ours has its numbers in memory where PyTorch's has them, whatever its shape says of them.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    in_memory: bool = False


class Empty(NamedTuple):
    """An output that nobody reads."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Theirs(NamedTuple):
    """An output that PyTorch's own kernel gives, called once more without what is ours: the one of this number."""

    number: int


class Rest(NamedTuple):
    """What of a call is left to PyTorch's own kernel: it is called with this argument in the place of that one."""

    place: int
    flags: tuple[bool, ...]


Output = Ours | Theirs | Empty | int | None
"""One of PyTorch's: a number where it is none that is a tensor, None where this call does not have it."""


def contiguous(shape: Sequence[int]) -> Ours:
    return Ours(tuple(shape), _steps(shape))


def like(x: torch.Tensor) -> Ours:
    """Laid out as PyTorch lays out what is like this: dense, in its order of axes."""
    meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return Ours(tuple(x.shape), torch.empty_like(meta).stride())


def fits(given: torch.Tensor, wanted: Ours) -> bool:
    """Does a tensor of ours lie as PyTorch's would, or can be seen so?"""
    return _fits(given.shape, given.stride(), wanted)


def _fits(shape: Sequence[int], strides: Sequence[int], wanted: Ours) -> bool:
    if tuple(shape) == wanted.shape:
        return all(n == 1 or a == b for n, a, b in zip(shape, strides, wanted.strides, strict=True))
    whole = tuple(strides) == _steps(shape) and wanted.strides == _steps(wanted.shape)
    return (whole or wanted.in_memory) and math.prod(shape) == math.prod(wanted.shape)


def translated(
    plan: Plan,
    given: Sequence[Any],
    posed: Sequence[Any],
    places: Sequence[int | None],
    outputs: Sequence[Output],
    rest: Rest | None = None,
) -> tuple[Any, ...] | None:
    """The plan over PyTorch's arguments, or None where it has what the extension cannot do.

    given: PyTorch's arguments. posed: ours. places: which of PyTorch's each of ours is; where it has been copied, so it
    will be. outputs: what PyTorch's op is to give. rest: what of the call is PyTorch's own kernel's, if anything is.
    """

    def slot(number: int) -> int:
        place = places[number] if number < len(places) else len(given) + number - len(places)
        if place is None:
            raise _Untranslatable
        return place

    made = [(tuple(make.args[0]), tuple(make.args[1]), _NUMBERS[make.keywords["dtype"]]) for make in plan.makers]

    def allocated(shape: Sequence[int], dtype: torch.dtype) -> int:
        made.append((tuple(shape), _steps(shape), _NUMBERS[dtype]))
        return len(given) + len(made) - 1

    found, ours = [], iter(plan.outputs)
    for each in outputs:
        if isinstance(each, Ours):
            index = (number := next(ours)) - len(places)
            if index < 0 or not _fits(*made[index][:2], each):
                return None
            made[index] = (each.shape, each.strides, made[index][2])
            found.append((slot(number), 0))
        elif isinstance(each, Empty):
            found.append((allocated(*each), 0))
        elif isinstance(each, Theirs):
            found.append((_THEIRS, each.number))
        else:
            found.append(_NOT_THERE if each is None else (_NUMBER, each))
    pairs = [(ours, given[place], place) for ours, place in zip(posed, places, strict=True) if place is not None]
    copied = [place for ours, theirs, place in pairs if ours is not None and ours.data_ptr() != theirs.data_ptr()]
    try:
        launches = [
            _launch(each, compiled, slot, allocated, posed[0].data_ptr())
            for each, compiled in zip(plan.launches, plan.compiled, strict=True)
        ]
    except _Untranslatable:
        return None
    return made, launches, found, copied, rest


class _Untranslatable(Exception):
    """A launch has something besides addresses, numbers and tensor maps."""


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _launch(
    recorded: Any,
    compiled: Any,
    slot: Callable[[int], int],
    allocated: Callable[[Sequence[int], torch.dtype], int],
    address: int,
) -> tuple[Any, ...]:
    _, grid, function, _, template, tensors, descriptors, structs = recorded
    meta = compiled.metadata
    plain = meta.num_ctas == 1 and not meta.launch_pdl and not meta.launch_cooperative_grid
    if not plain or meta.profile_scratch_size:
        raise _Untranslatable
    addresses: dict[Any, int] = dict(tensors)
    addresses |= {(position, field): number for position, _, places in structs for field, number in places}
    fields = {position: values for position, values, _ in structs}
    described = {position: (number, describe) for position, number, describe in descriptors}
    maps = iter(getattr(meta, "tensordesc_meta", None) or ())
    parameters: list[tuple[int, int | bytes]] = []
    sizes: list[int] = []
    for position, kind in enumerate(compiled.src.signature.values()):
        if position in described:
            number, describe = described[position]
            tensor_map, rest = _mapped(describe, next(maps, None), address)
            parameters.append((slot(number), tensor_map))
            parameters += [(-1, int(each) & _MASK) for each in rest]
            sizes += [_MAP, *[4] * (len(rest) // 2), *[8] * (len(rest) // 2)]
            continue
        for place, leaf, value in _leaves(position, kind, fields.get(position, template[position])):
            if leaf.startswith(("tensordesc", "nvTmaDesc")):
                raise _Untranslatable
            if leaf.startswith("*"):
                parameters.append((slot(addresses[place]), 0) if place in addresses else _NOT_THERE)
                sizes.append(8)
            else:
                parameters.append((-1, _bits(leaf, value)))
                sizes.append(_size(leaf))
    scratch = meta.global_scratch_size * math.prod(grid)  # Triton's own: for descriptors that a kernel makes
    parameters.append((allocated((scratch,), torch.uint8), 0) if scratch else _NOT_THERE)
    parameters.append(_NOT_THERE)  # and none for its profile
    if not _takes(function, [*sizes, 8, 8]):
        raise _Untranslatable
    return function, grid, 32 * meta.num_warps, meta.shared, parameters


def _leaves(place: Any, kind: Any, value: Any) -> Iterator[tuple[Any, str, Any]]:
    """(place, type, value) of each parameter that an argument is, or a struct's fields are."""
    if isinstance(kind, str):
        if kind != "constexpr":
            yield place, kind, value
        return
    for field, (inner, each) in enumerate(zip(kind, value, strict=True)):
        yield from _leaves((place, field), inner, each)


class _At:
    """Stands for a tensor that lies there."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _mapped(describe: Callable[[Any], Any], meta: Any, address: int) -> tuple[bytes, Sequence[int]]:
    """A descriptor's tensor map, for a tensor at that address, and the shape and strides that a kernel gets beside."""
    if meta is None:
        raise _Untranslatable
    from triton.backends.nvidia import driver

    make: Any = driver.make_tensordesc_arg
    more = [None] * (len(inspect.signature(make).parameters) - 2)
    found, *rest = make(describe(_At(address)), meta, *more)
    kind = type(found)
    if kind.__name__ != "PyCUtensorMap" or kind.__basicsize__ % _MAP:
        raise _Untranslatable
    return ctypes.string_at(id(found) + kind.__basicsize__ - _MAP, _MAP), rest


def _bits(kind: str, number: Any) -> int:
    """What the kernel reads of a number, from its lowest byte on."""
    if kind in _FLOATS:
        return int.from_bytes(struct.pack(_FLOATS[kind], number), "little")
    if kind.lstrip("iu").isdigit():
        return int(number) & _MASK
    raise _Untranslatable


def _size(kind: str) -> int:
    """Bytes of a number."""
    return struct.calcsize(_FLOATS[kind]) if kind in _FLOATS else max(int(kind.lstrip("iu")) // 8, 1)


def _takes(function: int, sizes: Sequence[int]) -> bool:
    """Has the compiled kernel parameters of these sizes? So that another Triton's way of calling is never guessed."""
    try:
        asked = ctypes.CDLL("libcuda.so.1").cuFuncGetParamInfo
    except (OSError, AttributeError):  # a driver older than CUDA 12.4
        return False
    asked.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()

    def there(index: int) -> int:
        known = asked(function, index, ctypes.byref(offset), ctypes.byref(size)) == 0
        return size.value if known else 0

    return [there(index) for index in range(len(sizes))] == list(sizes) and not there(len(sizes))
