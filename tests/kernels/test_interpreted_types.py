"""Types and tensors that tests share in Triton's interpreter are what Triton makes of each."""

import numpy as np
import pytest
from interpreted import remembered

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")


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
