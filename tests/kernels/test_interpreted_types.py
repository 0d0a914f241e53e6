"""Types and tensors that tests share in Triton's interpreter are what Triton makes of each."""

import itertools
import math

import numpy as np
import pytest
from interpreted import remembered
from programs.processes import python

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")
TritonSemantic = pytest.importorskip("triton.language.semantic").TritonSemantic


@pytest.fixture(autouse=True)
def _remembered():
    with remembered():
        yield


@pytest.mark.parametrize("shape", [[16, 4], [tl.constexpr(16), tl.constexpr(4)], tl.tuple([16, 4])], ids=str)
def test_types_of_a_shape_are_alike_however_it_is_written(shape):
    for element in (tl.float32, tl.int64, tl.pointer_type(tl.float16), tl.float32):
        made = tl.block_type(element, shape)
        assert (made.scalar, made.numel, list(made.shape)) == (element, 64, [16, 4])
        assert made == tl.block_type(element, [16, 4])
        assert made != tl.block_type(element, [4, 16])
        assert str(element) in str(made)


def test_tensors_have_the_shape_of_their_type():
    for shape in ([], [16], [2, 8], [16]):
        kind = tl.block_type(tl.float32, shape) if shape else tl.float32
        made = tl.tensor(interpreter.TensorHandle(np.zeros(shape, np.float32), tl.float32), kind)
        assert [each.value for each in made.shape] == shape
        assert (made.numel.value, made.type, made.dtype) == (16 if shape else 1, kind, tl.float32)


@pytest.mark.parametrize(
    ("shape", "error"),
    [([3], ValueError), ([], TypeError), ([2.0], TypeError), ([1 << 21], ValueError), ((2,), AssertionError)],
)
def test_shapes_that_triton_refuses_are_refused_each_time(shape, error):
    tl.block_type(tl.float32, [2])
    for _ in range(2):
        with pytest.raises(error):
            tl.block_type(tl.float32, shape)


BRINGING = ("binary_op_type_checking_impl", "broadcast_impl_value")
THEIRS = {name: getattr(TritonSemantic, name) for name in BRINGING}  # before anything is shared: fixtures come later
ELEMENTS = {
    tl.int1: np.bool_, tl.int32: np.int32, tl.int64: np.int64, tl.float16: np.float16, tl.float32: np.float32,
    tl.float64: np.float64,
}  # fmt: skip
SHAPES = [(), (8,), (1, 8), (4, 1)]
OPERANDS = [(element, shape) for element in ELEMENTS for shape in SHAPES]
NUMBERS = [0, 1, -3, 1 << 40, True, 0.0, -0.0, 0.1, -math.inf, math.nan, 1e300]


def _operand(what):
    """A number, or a tensor of the language: a scalar where there is no shape."""
    if not isinstance(what, tuple):
        return what
    element, shape = what
    data = (np.arange(math.prod(shape)).reshape(shape or (1,)) % 3).astype(ELEMENTS[element])
    kind = tl.block_type(element, list(shape)) if shape else element
    return tl.tensor(interpreter.TensorHandle(data, element), kind)


def _told(found):
    shape = [int(each) for each in found.type.shape] if found.type.is_block() else None
    data = found.handle.data
    return str(found.type), shape, found.handle.dtype.name, data.dtype, data.shape, data.tobytes()


def _brought(pair, **how):
    """What becomes of two operands, type and numbers of each; or how they are refused."""
    semantic = TritonSemantic(interpreter.interpreter_builder)
    try:
        return [*map(_told, semantic.binary_op_type_checking_impl(*map(_operand, pair), **how))]
    except (ValueError, TypeError, OverflowError) as refused:
        return type(refused)


@pytest.mark.parametrize("how", [{}, {"div_or_mod": True}, {"arithmetic_check": False}], ids=str)
def test_operands_are_brought_together_as_triton_does_it(how):
    pairs = [*itertools.product(OPERANDS, OPERANDS), *itertools.product(OPERANDS, NUMBERS)]
    pairs += [(number, operand) for operand, number in itertools.product(OPERANDS, NUMBERS)]
    with np.errstate(all="ignore"):
        ours = [_brought(pair, **how) for pair in pairs]
        again = [_brought(pair, **how) for pair in pairs]
        with pytest.MonkeyPatch.context() as patch:
            for name, function in THEIRS.items():
                patch.setattr(TritonSemantic, name, function)
            theirs = [_brought(pair, **how) for pair in pairs]
    assert [pair for pair, one, other in zip(pairs, ours, theirs, strict=True) if one != other] == []
    assert again == ours


COMPILED = """
import sys
import triton, triton.language as tl
from interpreted import remembered
from programs.processes import python
from triton.backends.compiler import GPUTarget

def grown(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) * 2.0 - 1)

grown.__module__ = "__main__"
with remembered():
    kernel = triton.runtime.jit.JITFunction(grown)
    source = triton.compiler.ASTSource(kernel, {{"x": "*fp32", "n": "constexpr"}}, {{(1,): 16}})
    print(triton.compiler.compile(source, target=GPUTarget("cuda", {arch}, 32)).asm["ptx"])
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_are_compiled_beside_what_is_remembered(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program = tmp_path / "program.py"
    program.write_text(COMPILED.format(arch=arch))
    assert "st.global" in python(f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')")
