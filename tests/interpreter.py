"""Mends what Triton's interpreter gets wrong on the CPU, so that bf16 kernels can be judged in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import remembered


def _float(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 numbers, which the interpreter keeps as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    """bf16 numbers nearest to fp32 values, as uint16."""
    rounded = torch.from_numpy(np.array(values, np.float32, order="C")).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


@contextmanager
def mended() -> Iterator[None]:
    """bf16 products and roundings as a GPU does them, sums by descriptor; sizes as integers with a recent NumPy.

    And without what takes most of its time: a launch patches Triton's language once, not at each call of a function,
    and shapes are looked at once (see `interpreted`).
    """
    from triton import language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor
    launch, patch_all, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

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

    dtypes, address = cache(interpreter._get_np_dtype), np.dtype(np.uint64)
    # Whether integers overflow is computed at great length, and looked at only by builders that debug.
    options = interpreter.interpreter_builder.options
    options = replace(options, sanitize_overflow=options.debug)

    def get_np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        return address if scalar.is_ptr() else dtypes(scalar)

    @cache
    def seen(function: Callable[..., Any]) -> frozenset[str]:
        """The modules of the language that a function's own module has."""
        found = function.__globals__.values()
        return frozenset(lang.__name__ for lang in (tl, tl.core) if any(each is lang for each in found))

    def start(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **options)
        finally:
            patched.clear()

    def patch_lang(function: Callable[..., Any]) -> Any:
        if patched and seen(function) <= patched:
            return interpreter._LangPatchScope()
        patched.update(seen(function))
        return patch_all(function)

    with remembered(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", start)
        monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
        monkeypatch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
        monkeypatch.setattr(builder, "create_dot", create_dot)
        monkeypatch.setattr(builder, "cast_impl", cast_impl)
        monkeypatch.setattr(builder, "create_descriptor_reduce", create_descriptor_reduce, raising=False)
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
        yield
