"""How the weight's gradient of PyTorch's convolutions is ours, and the others stay PyTorch's."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from tilebook import enabling, native
from tilebook.kernels.convolution.standing import STANDINGS
from tilebook.native.plans import Rest, Theirs, contiguous

(STANDING,) = STANDINGS
NAME = STANDING.name
SHAPES = (2, 8, 9, 7), (16, 8, 3, 2)


def _arguments(needs=(True, True, True), stride=(2, 1), padding=(1, 0), shapes=SHAPES, dtype=torch.bfloat16, **more):
    x, weight = (torch.randn(shape).to(dtype) for shape in shapes)
    given = {"dilation": [1] * len(stride), "transposed": False, "groups": 1, **more}
    nothing = [0] * len(stride)
    form = list(stride), list(padding), given["dilation"], given["transposed"], nothing, given["groups"]
    dy = torch.randn_like(torch.ops.aten.convolution(x, weight, None, *form))
    return dy, x, weight, [weight.shape[0]], *form, list(needs)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, True, False)])
def test_ours_is_the_weights_gradient_and_the_rest_pytorchs(needs):
    args = _arguments(needs)
    (mine,) = (STANDING.op().reference(*(each.double() if isinstance(each, torch.Tensor) else each for each in posed))
               for posed in [STANDING.posed(args)])  # fmt: skip
    wide = [each.double() if isinstance(each, torch.Tensor) else each for each in args]
    torch.testing.assert_close(mine, torch.ops.aten.convolution_backward(*wide)[1])
    theirs = [Theirs(number) if need else None for number, need in enumerate(needs)]
    assert STANDING.outputs(args) == [theirs[0], contiguous(args[2].shape), theirs[2]]
    assert STANDING.rest(args) == (Rest(10, (needs[0], False, needs[2])) if needs[0] or needs[2] else None)


PYTORCHS = {
    "not wanted": {"needs": (True, False, True)},
    "dilated": {"dilation": [2, 1]},
    "grouped": {"groups": 2, "shapes": ((2, 16, 9, 7), (16, 8, 3, 2))},
    "fp32": {"dtype": torch.float32},
    "one axis": {"shapes": ((2, 8, 9), (16, 8, 3)), "stride": [1], "padding": [1]},
}


@pytest.mark.parametrize("case", PYTORCHS)
def test_what_ours_does_not_do_is_pytorchs(case):
    assert STANDING.posed(_arguments(**PYTORCHS[case])) is None


@pytest.mark.parametrize("which", [1, 2])
def test_images_that_lie_by_channels_are_pytorchs(which):
    args = list(_arguments())
    args[which] = args[which].contiguous(memory_format=torch.channels_last)
    assert STANDING.posed(args) is None


class Machine:
    """'Runs' the gradient of a weight, which is all fives."""

    def __init__(self):
        self.status, self.launches = 0, []

    def launch(self, function, x, y, z, threads, _y, _z, shared, stream, parameters, extra):
        if not self.status:
            self.launches.append(function)
            address = ctypes.c_uint64.from_address(parameters[0]).value
            ctypes.memset(address, 0x40, 16 * 8 * 3 * 2 * 4)
        return self.status


FIVES = torch.full((1,), 0x40404040, dtype=torch.int32).view(torch.float32).item()


def _plan(rest, *outputs):
    return None, ([((16, 8, 3, 2), (48, 6, 2, 1), 6)], [(7, (1, 1, 1), 32, 0, [(11, 0)])], [*outputs], [], rest), None


WHOLE = _plan((10, (True, False, True)), (-3, 0), (11, 0), (-3, 2))


@pytest.fixture
def served(extension):
    yield from extension(Machine(), (NAME,))


def _step(x, weight, bias):
    y = F.conv2d(x, weight, bias, stride=(2, 1), padding=(1, 0))
    wanted = [each for each in (x, weight, bias) if each is not None and each.requires_grad]
    return torch.autograd.grad((y * y.detach().sin()).sum(), wanted)


def _given(needs_input=True, bias=True):
    x, weight = torch.randn(SHAPES[0], requires_grad=needs_input), torch.randn(SHAPES[1], requires_grad=True)
    return x, weight, torch.randn(16, requires_grad=True) if bias else None


def _plain(served, *given):
    served.extension.stop()
    try:
        return _step(*given)
    finally:
        served.extension.start(served.answer)


def test_the_other_gradients_are_found_in_the_same_call(served):
    given = _given()
    plain = _plain(served, *given)
    served.answers[NAME] = WHOLE
    for found in (_step(*given), _step(*given)):
        torch.testing.assert_close([found[0], found[2]], [plain[0], plain[2]], rtol=0, atol=0)
    assert served.machine.launches == [7]
    assert (found[1] == FIVES).all()
    assert found[1].shape == given[1].shape


def test_where_nothing_else_is_wanted_pytorch_is_not_called(served):
    given = _given(needs_input=False, bias=False)
    served.answers[NAME] = _plan(None, (-1, 0), (11, 0), (-1, 0))
    _step(*given)
    (found,) = _step(*given)
    assert (found == FIVES).all()


def test_a_launch_that_fails_is_pytorchs(served):
    given = _given()
    plain = _plain(served, *given)
    served.answers[NAME] = WHOLE
    _step(*given)
    served.machine.status = 700
    torch.testing.assert_close(_step(*given), plain, rtol=0, atol=0)


SPOILT = {
    "no such argument": _plan((11, (True, False, True)), (-3, 0), (11, 0), (-3, 2)),
    "no such output": _plan((10, (True, False, True)), (-3, 3), (11, 0), (-3, 2)),
    "nothing was asked for": _plan(None, (-3, 0), (11, 0), (-3, 2)),
    "no flags": _plan((10, 5), (-3, 0), (11, 0), (-3, 2)),
}


@pytest.mark.parametrize("case", SPOILT)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_spoilt_plan_is_pytorchs(served, case):
    given = _given()
    plain = _plain(served, *given)
    served.answers[NAME] = SPOILT[case]
    for _ in range(2):
        torch.testing.assert_close(_step(*given), plain, rtol=0, atol=0)
    assert not served.machine.launches


class Chosen:
    """A choice of ours, that nothing is recorded of yet."""

    native, probed, plan, calls = False, None, None, 1

    def __call__(self, dy, x, form):
        return (STANDING.op().reference(dy, x, form),)


def test_python_finds_the_rest_too_while_nothing_is_recorded(monkeypatch):
    args = _arguments()
    monkeypatch.setattr(native.dispatch, "lookup", lambda op, given: Chosen())
    serving = native._Serving()
    serving._standings[NAME] = STANDING
    outputs, decision, _ = serving.answer(NAME, args)
    assert decision is None
    torch.testing.assert_close(outputs, list(torch.ops.aten.convolution_backward(*args)), rtol=0.05, atol=0.1)


def test_it_is_among_what_is_served():
    assert STANDING in enabling._STANDINGS
