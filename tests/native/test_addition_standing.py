"""Sums of two large tensors, of two dtypes or of two orders in memory, which may be ours."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from tilebook import enabling
from tilebook.kernels.addition.standing import STANDINGS
from tilebook.native import plans

(STANDING,) = STANDINGS
NAME = STANDING.name
B, S, N = 2, 512, 1024


def _turned(*shape, dtype=torch.float32):
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).mT


def _nhwc(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


FORMS = {
    "two dtypes": lambda: (torch.randn(4, 6, 8), torch.randn(4, 6, 8).bfloat16()),
    "the narrow one first": lambda: (torch.randn(4, 32).half(), torch.randn(4, 32)),
    "two dtypes, both turned": lambda: (_turned(2, 4, 8), _turned(2, 4, 8, dtype=torch.bfloat16)),
    "the first is turned": lambda: (_turned(2, 12, 8), torch.randn(2, 12, 8).bfloat16()),
    "the second is turned": lambda: (torch.randn(2, 12, 8), _turned(2, 12, 8)),
    "of two axes": lambda: (torch.randn(12, 8), _turned(12, 8)),
    "channels last": lambda: (_nhwc(2, 6, 4, 4), torch.randn(2, 6, 4, 4)),
    "channels last second": lambda: (torch.randn(2, 6, 4, 4).bfloat16(), _nhwc(2, 6, 4, 4)),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_posed_is_the_same_sum(form):
    x, y = FORMS[form]()
    posed = STANDING.posed((x, y))
    op = STANDING.op()
    problem = op.problem.of(*posed)
    assert problem.lies == ("flat" if x.stride() == y.stride() else "first" if posed[0].stride(-1) != 1 else "second")
    right, (output,) = x + y, STANDING.outputs((x, y))
    assert (output.shape, output.strides) == (right.shape, right.stride())
    assert plans.fits(posed[0], output)
    found = op.reference(*posed)
    assert found.dtype == right.dtype
    given = torch.empty_strided(posed[0].shape, posed[0].stride(), dtype=found.dtype).copy_(found)
    torch.testing.assert_close(given.as_strided(output.shape, output.strides), right, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.randn(3, 5), torch.randn(3, 5).bfloat16()),  # not so many at a time
        (torch.randn(4, 16)[:, ::2], torch.randn(4, 16).bfloat16()[:, ::2]),  # with holes
        (torch.randn(1, 8).expand(4, 8), torch.randn(4, 8).bfloat16()),
        (torch.randn(2, 4, 4, 8).transpose(0, 1), torch.randn(4, 2, 4, 8)),  # another order
        (torch.randn(0, 8), torch.randn(0, 8).bfloat16()),
    ],
)
def test_what_ours_does_not_do_is_pytorchs(x, y):
    assert STANDING.posed((x, y)) is None


class Machine:
    """'Adds' up to threes."""

    def __init__(self):
        self.launches = 0

    def launch(self, function, x, y, z, threads, _y, _z, shared, stream, parameters, extra):
        self.launches += 1
        threes = torch.full((B * S * N,), 3.0)
        ctypes.memmove(ctypes.c_uint64.from_address(parameters[0]).value, threes.data_ptr(), 4 * B * S * N)
        return 0


PLAN = None, ([((B, S, N), (S * N, N, 1), 6)], [(7, (1, 1, 1), 32, 0, [(2, 0)])], [(2, 0)], []), None


@pytest.fixture
def served(extension):
    yield from extension(Machine(), (NAME,))


def test_a_residual_stream_asks_for_it_and_gradients_are_pytorchs(served):
    x, y = torch.randn(B, S, N).requires_grad_(), torch.randn(B, S, N).bfloat16().requires_grad_()
    plain = x.detach() + y.detach()
    assert torch.equal(x + y, plain)
    ((name, args),) = served.asked
    assert name == NAME
    assert [each.shape for each in args] == [(B, S, N)] * 2
    served.extension.clear()
    served.answers[NAME] = PLAN
    x + y
    found = torch.add(x, y)
    assert served.machine.launches == 1
    assert torch.equal(found, torch.full((B, S, N), 3.0))
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones(B, S, N))
    assert torch.equal(y.grad, torch.ones(B, S, N).bfloat16())
    assert y.grad.dtype == torch.bfloat16


LARGE, NARROW = torch.randn(B, S, N), torch.randn(B, S, N).bfloat16()


@pytest.mark.parametrize(
    "program",
    [
        lambda: LARGE + LARGE,
        lambda: LARGE + NARROW[:1],
        lambda: LARGE[0] + NARROW[0],  # small
        lambda: torch.add(LARGE, NARROW, alpha=2),
        lambda: LARGE + 1.5,
        lambda: LARGE.double() + NARROW,
        lambda: LARGE + NARROW.half().to(torch.int32),
        lambda: F.dropout(LARGE, 0.0) + LARGE,
    ],
)
def test_other_sums_are_pytorchs(served, program):
    served.extension.stop()
    plain = program()
    served.extension.start(served.answer)
    served.answers[NAME] = PLAN
    assert torch.equal(program(), plain)
    assert torch.equal(program(), plain)


def test_off_nobody_is_asked(served):
    served.extension.stop()
    assert torch.equal(LARGE + NARROW, LARGE + NARROW.float())
    assert served.asked == []
    assert STANDING in enabling._STANDINGS
