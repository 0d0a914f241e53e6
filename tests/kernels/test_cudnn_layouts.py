"""What cuDNN's backward pass is called with: PyTorch repeats its graphs also for tensors that lie otherwise."""

import math
from types import SimpleNamespace

import pytest
import torch

from tilebook.kernels.attention.form import PLAIN
from tilebook.kernels.attention.peers import cudnn

SHAPE = 2, 3, 5, 8


def laid(how, shape=SHAPE):
    batch, heads, length, width = shape
    if how == "transposed":
        return torch.randn(batch, length, heads, width).transpose(1, 2)
    if how == "cut":
        return torch.randn(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4)[1]
    if how == "off":
        return torch.randn(math.prod(shape) + 1)[1:].view(shape)
    if how == "expanded":
        return torch.randn(1, 1, length, 1).expand(shape)
    return torch.randn(shape)


@pytest.fixture
def seen(monkeypatch):
    calls = []

    def backward(*args, scale):
        calls.append(args)
        return tuple(torch.empty_like(x) for x in args[1:4])

    monkeypatch.setattr(cudnn, "_aten", SimpleNamespace(_scaled_dot_product_cudnn_attention_backward=backward))
    return calls


@pytest.mark.parametrize("how", ["contiguous", "transposed", "cut"])
def test_gradients_and_outputs_in_any_layout_reach_it_as_its_forward_pass_lays_them_out(seen, how):
    q, k, v = laid(how), laid("transposed"), laid("contiguous")
    lse = torch.randn(SHAPE[:3])
    for which in ("contiguous", "transposed", "cut", "off", "expanded"):
        for other in ("contiguous", "transposed"):
            do, o = laid(which), laid(other)
            cudnn.backward(do, q, k, v, o, lse, PLAIN, 1.0)
            given_do, given_q, _, _, given_o = seen[-1][:5]
            assert torch.equal(given_do, do)
            assert torch.equal(given_o, o)
            assert given_do.stride() == given_o.stride() == torch.empty_like(given_q).stride()
            assert given_do.data_ptr() % 16 == given_o.data_ptr() % 16 == 0


def test_its_graphs_are_not_those_of_other_calls(seen):
    q = laid("contiguous")
    cudnn.backward(q, q, q, q, q, torch.randn(SHAPE[:3]), PLAIN, 1.0)
    dropout = seen[-1][13]
    assert dropout == 0
    assert math.copysign(1, dropout) == -1


def test_what_lies_right_is_not_copied(seen):
    q = laid("cut", (1, *SHAPE[1:]))
    do, o = laid("transposed", q.shape), torch.empty_like(q)
    odd = do.as_strided(do.shape, (7, *do.stride()[1:]))  # one batch: any step to the next
    for each in (do, odd):
        cudnn.backward(each, q, q, q, o, torch.randn(q.shape[:3]), PLAIN, 1.0)
        given_do, given_o = seen[-1][0], seen[-1][4]
        assert given_do.data_ptr() == do.data_ptr()
        assert given_o.data_ptr() == o.data_ptr()
