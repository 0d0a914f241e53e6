"""The sum of a bias's gradient in autocast's linear layers, which may be ours."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from tilebook import enabling
from tilebook.kernels.bias.standing import STANDINGS
from tilebook.native.plans import number_of

(STANDING,) = STANDINGS
NAME = STANDING.name
M, K, N = 6, 8, 16
FP32 = number_of(torch.float32)


def test_it_is_the_sum_of_all_rows():
    dy = torch.randn(40, 24, dtype=torch.bfloat16)
    (posed,) = STANDING.posed((dy, FP32))
    torch.testing.assert_close(STANDING.op().reference(posed), dy.float().sum(0))
    (output,) = STANDING.outputs((dy, FP32))
    assert output[:2] == ((24,), (1,))
    assert STANDING in enabling._STANDINGS


@pytest.mark.parametrize("dy", [torch.randn(4, 8), torch.randn(8, 4).bfloat16().t(), torch.randn(0, 8).bfloat16()])
def test_what_ours_does_not_do_is_pytorchs(dy):
    assert STANDING.posed((dy, FP32)) is None


def test_a_sum_that_is_to_be_rounded_is_pytorchs():
    assert STANDING.posed((torch.randn(8, 4).bfloat16(), number_of(torch.bfloat16))) is None


class Machine:
    """'Sums' up to threes."""

    def __init__(self):
        self.launches = 0

    def launch(self, function, x, y, z, threads, _y, _z, shared, stream, parameters, extra):
        self.launches += 1
        threes = torch.full((N,), 3.0)
        ctypes.memmove(ctypes.c_uint64.from_address(parameters[0]).value, threes.data_ptr(), 4 * N)
        return 0


PLAN = None, ([((N,), (1,), FP32)], [(7, (1, 1, 1), 32, 0, [(2, 0)])], [(2, 0)], []), None


@pytest.fixture
def served(extension):
    yield from extension(Machine(), (NAME,))


def _gradients(bias=True, again=False):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((M, K), (N, K), (N,)))
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight, b if bias else None)
    given = (x, weight, b) if bias else (x, weight)
    first = torch.autograd.grad(y.float().square().sum(), given, create_graph=again)
    return torch.autograd.grad(first[0].square().sum(), weight) if again else first


def test_a_linear_layers_backward_pass_asks_for_it(served):
    served.extension.stop()
    plain = _gradients()
    served.extension.start(served.answer)
    for found, wanted in zip(_gradients(), plain, strict=True):
        assert torch.equal(found, wanted)
    assert [(name, args[0].shape, args[1]) for name, args in served.asked] == [(NAME, (M, N), FP32)]
    served.extension.clear()
    served.answers[NAME] = PLAN
    _gradients()
    dx, dw, db = _gradients()
    assert served.machine.launches == 1
    assert torch.equal(db, torch.full((N,), 3.0))
    assert torch.equal(dx, plain[0])
    assert torch.equal(dw, plain[1])


def test_no_bias_and_gradients_of_gradients_do_not(served):
    served.answers[NAME] = PLAN
    _gradients(bias=False)
    _gradients(again=True)
    assert served.asked == []
