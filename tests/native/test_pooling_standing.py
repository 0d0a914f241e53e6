"""How max pooling's gradient is ours in PyTorch's op, and what of it stays PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from tilebook import enabling
from tilebook.kernels.pooling.standing import STANDINGS
from tilebook.native.plans import Ours

(STANDING,) = STANDINGS
NAME = STANDING.name
LAST = torch.channels_last


def _arguments(
    shape=(2, 3, 9, 7),
    dtype=torch.float32,
    kernel=(3, 3),
    stride=(2, 1),
    padding=(1, 0),
    dilation=(1, 1),
    ceil=False,
    laid=None,
):
    x = torch.randn(shape, dtype=dtype)
    x = x if laid is None else x.contiguous(memory_format=laid)
    y, indices = F.max_pool2d(x, kernel, stride, padding, dilation, ceil, return_indices=True)
    indices = indices if laid is None else indices.contiguous(memory_format=laid)
    return [torch.randn_like(y), x, list(kernel), list(stride), list(padding), list(dilation), ceil, indices]


def _agree(args):
    posed = STANDING.posed(args)
    mine = STANDING.op().reference(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in posed))
    theirs = torch.ops.aten.max_pool2d_with_indices_backward(*args)
    torch.testing.assert_close(mine, theirs.double(), rtol=1e-6, atol=1e-6)
    assert STANDING.outputs(args) == [Ours(tuple(theirs.shape), theirs.stride())]


@pytest.mark.parametrize("laid", [None, LAST])
def test_ours_is_the_gradient(laid):
    _agree(_arguments(laid=laid))


def test_a_stride_that_is_left_out_is_the_kernels():
    args = _arguments(kernel=(2, 3), stride=(2, 3), padding=(0, 1))
    args[3] = []
    _agree(args)


def test_one_number_stands_for_both_axes():
    args = _arguments(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    args[2:5] = [3], [2], [1]
    _agree(args)


def test_gradients_that_lie_otherwise_are_copied_by_rows():
    args = _arguments()
    args[0] = args[0].contiguous(memory_format=LAST)
    assert STANDING.posed(args)[0].is_contiguous()
    _agree(args)


PYTORCHS = {
    "dilated": {"dilation": (2, 1)},
    "the last window cut": {"ceil": True},
    "fp64": {"dtype": torch.float64},
    "no images": {"shape": (0, 3, 9, 7)},
}


@pytest.mark.parametrize("case", PYTORCHS)
def test_what_ours_does_not_do_is_pytorchs(case):
    assert STANDING.posed(_arguments(**PYTORCHS[case])) is None


def test_one_image_without_a_batch_is_pytorchs():
    args = _arguments()
    for place in (0, 1, 7):
        args[place] = args[place][0]
    assert STANDING.posed(args) is None


@pytest.mark.parametrize("which", [1, 7])
def test_images_that_lie_otherwise_than_their_places_are_pytorchs(which):
    args = _arguments()
    args[which] = args[which].contiguous(memory_format=LAST)
    assert STANDING.posed(args) is None


def test_by_channels_a_gradient_by_rows_is_pytorchs():
    args = _arguments(laid=LAST)
    args[0] = args[0].contiguous()
    assert STANDING.posed(args) is None


class Machine:
    """Launches nothing."""

    launches = ()

    def launch(self, *given):
        raise AssertionError("nothing is to be launched")


def test_it_is_asked_by_a_training_step(extension):
    for served in extension(Machine(), (NAME,)):
        x = torch.randn(2, 3, 9, 9, requires_grad=True)
        plain = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).square().sum(), x)[0]
        assert [name for name, _ in served.asked] == [NAME]
        (args,) = (args for name, args in served.asked)
        assert STANDING.posed(args) is not None
        served.extension.clear()
        served.answers[NAME] = ([torch.full_like(x, 5.0)], None, None)
        found = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).square().sum(), x)[0]
        assert (found == 5).all()
        assert found.shape == plain.shape


def test_it_is_among_what_is_served():
    assert STANDING in enabling._STANDINGS
