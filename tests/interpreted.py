"""Types and tensors of Triton's language, made once for each shape: in the interpreter they take most of the time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def _numbers(shape: Any) -> tuple[int, ...] | None:
    """The numbers of a shape; None where it is made of anything else, which Triton is to refuse or to unwrap."""
    numbers = tuple(shape)
    return numbers if {*map(type, numbers)} == {int} else None


@contextmanager
def remembered() -> Iterator[None]:
    """What is the same for all tensors of a shape is shared by them; functions of the language are called at once."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    make_type, make_tensor, patch = core.block_type.__init__, core.tensor.__init__, interpreter._patch_attr
    types: dict[Any, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        numbers = _numbers(shape) if isinstance(shape, (list, core.tuple)) else None
        if numbers is None:
            make_type(self, element_ty, shape)
            self.of_tensors = None
            return
        key = numbers, element_ty.name
        if key not in types:
            make_type(self, element_ty, shape)
            of_tensors = core.constexpr(self.numel), core.tuple(map(core.constexpr, numbers))
            types[key] = self.shape, self.numel, self.name, of_tensors
        self.element_ty = element_ty
        self.shape, self.numel, self.name, self.of_tensors = types[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.of_tensors is None:
            make_tensor(self, handle, type)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensors

    def patch_attr(obj: Any, name: str, member: Callable[..., Any], *rest: Any) -> None:
        # Triton's wrapper looks whether it is called outside of a kernel.
        wrapped = getattr(member, "__code__", None) is wrapper
        patch(obj, name, member.__wrapped__ if wrapped else member, *rest)

    def checked(self: Any, lhs: Any, rhs: Any, *rest: Any, **options: Any) -> Any:
        if type(lhs) is type(rhs) is core.tensor:
            one, other = lhs.type, rhs.type
            alike = one.of_tensors is not None and one.of_tensors is other.of_tensors
            if alike and one.scalar.name == other.scalar.name and one.scalar.name in plain:
                return lhs, rhs
        return check(self, lhs, rhs, *rest, **options)

    check, plain = TritonSemantic.binary_op_type_checking_impl, frozenset({"fp32", "fp64", "int1", "int32", "int64"})
    wrapper = core.builtin(lambda _semantic=None: None).__code__
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(core.dtype, "of_tensors", (core.constexpr(1), core.tuple([])), raising=False)
        monkeypatch.setattr(core.block_type, "__init__", block_type)
        monkeypatch.setattr(core.tensor, "__init__", tensor)
        monkeypatch.setattr(interpreter, "_patch_attr", patch_attr)
        monkeypatch.setattr(TritonSemantic, "binary_op_type_checking_impl", checked)
        yield
