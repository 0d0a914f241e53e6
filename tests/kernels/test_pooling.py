"""Max pooling's gradient: any form of windows, in any order in memory."""

import pytest
import torch
import torch.nn.functional as F
from drawing import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tilebook import op
from tilebook.kernels.pooling.problem import Problem, reaching
from tilebook.windows import Form

BWD = op.get("max_pool2d_bwd")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (2, 2, 0), (2, 4, 1), (5, 3, 2), (1, 1, 0), (7, 2, 3)]
)
def test_windows_that_reach_into_a_cell_are_all_that_do(kernel, stride, padding):
    first, count = reaching(kernel, stride, padding)
    cell = 20
    columns = range(cell * stride, (cell + 1) * stride)
    touching = [w for w in range(100) if any(0 <= x + padding - w * stride < kernel for x in columns)]
    assert set(touching) <= {cell + first + i for i in range(count)}
    assert count <= len(touching) + 2


@interpreted
@settings(max_examples=examples(40), deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 19), st.integers(1, 19)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)), stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), last=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_form_is_right(sizes, kernel, stride, padding, last, seed):
    form = Form(kernel, stride, padding)
    assume(min(form.made(*sizes[2:])) > 0 and all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    laid = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=laid)
    y, indices = F.max_pool2d(x, *form, return_indices=True)
    dy = torch.arange(1.0, y.numel() + 1).view(y.shape).contiguous(memory_format=laid)
    given_ = dy, indices.contiguous(memory_format=laid), *sizes[2:], str(form)
    assume(BWD.tunable.supports(Problem.of(*given_)))
    (found,) = BWD.tunable(*given_, config=op.Config(BLOCK=128, num_warps=1))
    truth = BWD.reference(dy.double(), *given_[1:])
    assert torch.equal(found.double(), truth)
    assert found.is_contiguous(memory_format=laid) or found.is_contiguous()
