"""Types and tensors of Triton's language, made once for each shape: in the interpreter they take most of the time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest


def _numbers(shape: Any) -> tuple[int, ...] | None:
    """The numbers of a shape; None where it is made of anything else, which Triton is to refuse or to unwrap."""
    numbers = tuple(shape)
    return numbers if {*map(type, numbers)} == {int} else None


def _follows(number: Any, dtype: str) -> bool:
    """Does a number of Python's take on this type, whatever is computed of both?"""
    if type(number) is float:
        return dtype in ("fp32", "fp64")
    return type(number) is int and -(2**31) <= number < 2**31 and dtype in ("fp32", "fp64", "int32", "int64")


def _alike(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Are these shapes of as many axes, each as long in both or of length one?"""
    return len(left) == len(right) and all(x == y or 1 in (x, y) for x, y in zip(left, right, strict=True))


@contextmanager
def remembered() -> Iterator[None]:
    """What is the same for all tensors of a shape is shared by them; functions of the language are called at once."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    types: dict[Any, Any] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    sizes: dict[int, tuple[int, ...]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        numbers = _numbers(shape) if isinstance(shape, (list, core.tuple)) else None
        if numbers is None:
            make_type(self, element_ty, shape)
            self.of_tensors = None
            return
        key = numbers, element_ty.name
        if key not in types:
            make_type(self, element_ty, shape)
            if numbers not in shapes:
                shapes[numbers] = core.constexpr(self.numel), core.tuple(map(core.constexpr, numbers))
                sizes[id(shapes[numbers])] = numbers
            types[key] = self.shape, self.numel, self.name, shapes[numbers]
        self.element_ty = element_ty
        self.shape, self.numel, self.name, self.of_tensors = types[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.of_tensors is None:
            make_tensor(self, handle, type)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensors

    def patch_attr(obj: Any, name: str, member: Callable[..., Any], builder: Any, scope: Any) -> None:
        # Triton's wrapper looks whether it is called outside of a kernel.
        wrapped = getattr(member, "__code__", None) is wrapper
        function, semantic = member.__wrapped__ if wrapped else member, semantic_of(builder)

        def called(*args: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return function(*args, **options)

        scope.set_attr(obj, name, called)

    def checked(self: Any, lhs: Any, rhs: Any, *rest: Any, **options: Any) -> Any:
        if self.builder is not interpreter.interpreter_builder:
            return check(self, lhs, rhs, *rest, **options)
        if type(lhs) is type(rhs) is core.tensor:
            one, other = lhs.type, rhs.type
            if one.scalar.name == other.scalar.name and one.scalar.name in plain:
                return broadcast(self, lhs, rhs)
            moved = rest[:1] == (True,) and one.scalar.is_ptr() and other.scalar.name in integers
            return broadcast(self, lhs, rhs) if moved else check(self, lhs, rhs, *rest, **options)
        arithmetic = rest[2:3] != (False,) and options.get("arithmetic_check", True)
        if arithmetic and type(lhs) is core.tensor and _follows(rhs, lhs.dtype.name):
            return broadcast(self, lhs, constant(self, rhs, lhs.dtype))
        if arithmetic and type(rhs) is core.tensor and _follows(lhs, rhs.dtype.name):
            return broadcast(self, constant(self, lhs, rhs.dtype), rhs)
        return check(self, lhs, rhs, *rest, **options)

    def constant(self: Any, number: Any, dtype: Any) -> Any:
        key = number or str(number), type(number), dtype.name  # the two zeros are told apart
        if key not in constants:
            constants[key] = self.scalar_constant(number, dtype=dtype)
        return constants[key]

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        compiled = self.builder is not interpreter.interpreter_builder
        if compiled or one.of_tensors is None or other.of_tensors is None:
            return spread(self, lhs, rhs)
        if one.of_tensors is other.of_tensors:
            return lhs, rhs
        if not other.is_block() and other.scalar.name in plain:
            return lhs, splat(rhs, one)
        if not one.is_block() and one.scalar.name in plain:
            return splat(lhs, other), rhs
        left, right = sizes.get(id(one.of_tensors)), sizes.get(id(other.of_tensors))
        if left is None or right is None or not _alike(left, right):
            return spread(self, lhs, rhs)
        whole = tuple(map(max, left, right))
        return stretched(lhs, left, whole), stretched(rhs, right, whole)

    def splat(scalar: Any, block: Any) -> Any:
        handle, numbers = scalar.handle, sizes[id(block.of_tensors)]
        data = np.full(numbers, handle.data, dtype=handle.data.dtype)
        return core.tensor(interpreter.TensorHandle(data, handle.dtype.scalar), typed(scalar.dtype, numbers))

    def stretched(block: Any, before: tuple[int, ...], numbers: tuple[int, ...]) -> Any:
        if before == numbers:
            return block
        handle = interpreter.TensorHandle(np.broadcast_to(block.handle.data, numbers), block.handle.dtype.scalar)
        return core.tensor(handle, core.block_type(block.dtype, list(numbers)))

    @cache
    def typed(dtype: Any, numbers: tuple[int, ...]) -> Any:
        return core.block_type(dtype, list(numbers))

    check, spread = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    plain, integers = frozenset({"fp32", "fp64", "int1", "int32", "int64"}), frozenset({"int32", "int64"})
    semantic_of = cache(TritonSemantic)
    constants: dict[Any, Any] = {}
    wrapper = core.builtin(lambda _semantic=None: None).__code__
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(core.dtype, "of_tensors", (core.constexpr(1), core.tuple([])), raising=False)
        monkeypatch.setattr(core.block_type, "__init__", block_type)
        monkeypatch.setattr(core.tensor, "__init__", tensor)
        monkeypatch.setattr(interpreter, "_patch_attr", patch_attr)
        monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", checked)
        monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", broadcast)
        yield
