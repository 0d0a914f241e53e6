"""Mends what Triton's interpreter gets wrong on the CPU, so that bf16 kernels can be judged in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch


def _float(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 numbers, which the interpreter keeps as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    """bf16 numbers nearest to fp32 values, as uint16."""
    rounded = torch.from_numpy(np.array(values, np.float32, order="C")).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


@contextmanager
def mended() -> Iterator[None]:
    """bf16 products and roundings as a GPU does them, sums by descriptor; sizes as integers with a recent NumPy."""
    from triton import language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        # The interpreter multiplies the bit patterns.
        left, right = (x.data if x.dtype.scalar != tl.bfloat16 else _float(x.data) for x in (a, b))
        if left is a.data and right is b.data:
            return dot(self, a, b, d, *rest)
        return interpreter.TensorHandle(np.matmul(left, right, dtype=np.float32) + d.data, d.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        # The interpreter truncates to bf16, and twice the error of a GPU's rounding is just what the tests forbid.
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_bits(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> Any:
        # The interpreter has no reductions by descriptor; its programs run one after the other.
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = desc.materialize_pointers(indices)
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED, None)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        # Triton 3.6 calls int() on arrays of one element, which NumPy 2.4 refuses.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(builder, "create_dot", create_dot)
        monkeypatch.setattr(builder, "cast_impl", cast_impl)
        monkeypatch.setattr(builder, "create_descriptor_reduce", create_descriptor_reduce, raising=False)
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
        yield
