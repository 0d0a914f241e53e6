"""A bias that learns, where PyTorch's memory-efficient kernels serve: their contract, and what is made of it."""

import pytest
import torch

from tilebook.kernels.attention import learned
from tilebook.kernels.attention.pytorch import sdpa


def scores(q, k, bias, scale):
    return q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias


class Refusing(torch.autograd.Function):
    """What PyTorch's op of the gradients is to autograd: something that has none."""

    @staticmethod
    def forward(ctx, run, *tensors):
        return run(*tensors)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("derivative for the backward pass is not implemented")


class Kernels:
    """What PyTorch's do, rows that see nothing included: 0, and NaN of the log-sum-exp that they left."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, bias, keep, dropout, causal, *, scale):
        self.calls.append(bias)
        s = scores(q, k, bias, scale)
        o = (s.softmax(-1) @ v).nan_to_num()
        return o, s.logsumexp(-1), torch.zeros(()), torch.zeros(())

    def backward(self, do, q, k, v, bias, o, lse, seed, offset, dropout, wanted, causal, *, scale):
        def run(do, q, k, v, bias, o):
            p = (scores(q, k, bias, scale) - lse[..., None]).exp()
            ds = p * (do @ v.mT - (do * o).sum(-1, True))
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            return ds @ k * factor, ds.mT @ q * factor, p.mT @ do, ds

        return Refusing.apply(run, do, q, k, v, bias, o)


@pytest.fixture
def kernels(monkeypatch):
    found = Kernels()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(learned, "_forward", found.forward)
    monkeypatch.setattr(learned, "_backward", found.backward)
    monkeypatch.setattr(learned, "_chosen", lambda *args, **options: learned._EFFICIENT)
    return found


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [(1, 2, 5, 7), (3, 1, 1, 7), (3, 2, 5, 7)], ids=str)
def test_its_gradients_are_right_and_rows_that_see_nothing_have_none(kernels, shape, scale):
    q, k, v = drawn(3, 2, 5, 8), drawn(3, 2, 7, 8) / 2, drawn(3, 2, 7, 8) / 3
    bias = drawn(*shape)
    bias[-1, :, -1] = -torch.inf
    bias[0, 0, 0, 3:] = -torch.inf
    hidden = (bias == -torch.inf).all(-1, True).expand(3, 2, 5, 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    o = sdpa(*leaves[:3], False, scale, leaves[3])
    do = drawn(3, 2, 5, 8) / 5
    found = torch.autograd.grad(o, leaves, do)
    assert len(kernels.calls) == 1
    assert kernels.calls[0].shape == (3, 2, 5, 7)

    right = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    shown = right[3].masked_fill(bias == -torch.inf, -1e300)
    expected = (scores(*right[:2], shown, scale).softmax(-1) @ right[2]).masked_fill(hidden, 0.0)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, right, do))


@pytest.mark.parametrize("chosen", [learned._EFFICIENT, 3])
def test_numbers_that_are_one_in_memory_have_each_its_own_gradient(kernels, monkeypatch, chosen):
    monkeypatch.setattr(learned, "_chosen", lambda *args, **options: chosen)
    for bias in (
        drawn(1, 1, 5, 16).expand(3, 2, 5, 16), drawn(5, 1).expand(5, 16), drawn(2, 1, 16).expand(2, 5, 16),
        drawn(1, 2, 1, 5).expand(3, 2, 5, 5),
    ):  # fmt: skip
        n = bias.shape[-1]
        q, k, v = drawn(3, 2, 5, 8), drawn(3, 2, n, 8) / 2, drawn(3, 2, n, 8) / 3
        leaf, right = (bias.detach().requires_grad_() for _ in range(2))
        expected = scores(q, k, right, None).softmax(-1) @ v
        o = sdpa(q, k, v, False, None, leaf)
        do = drawn(3, 2, 5, 8) / 5
        torch.testing.assert_close(torch.autograd.grad(o, leaf, do), torch.autograd.grad(expected, right, do))


def test_gradients_that_lie_anyhow_are_copied_for_the_kernels(kernels, monkeypatch):
    q, bias = drawn(3, 2, 5, 8).requires_grad_(), drawn(1, 2, 5, 5).requires_grad_()
    do = torch.empty(241, dtype=torch.float64)[1:].view(3, 2, 5, 8).copy_(drawn(3, 2, 5, 8))
    assert do.data_ptr() % 16
    given, backward = [], kernels.backward
    monkeypatch.setattr(learned, "_backward", lambda x, *rest, **how: given.append(x) or backward(x, *rest, **how))
    torch.autograd.grad(sdpa(q, q, q, False, None, bias), (q, bias), do)
    assert given[0].data_ptr() % 16 == 0


def test_a_bias_that_lies_by_heads_is_laid_as_kernels_load_it(kernels):
    q, do = drawn(3, 2, 5, 8), drawn(3, 2, 5, 8)
    bias = drawn(3, 5, 5, 2).permute(0, 3, 1, 2).requires_grad_()
    (found,) = torch.autograd.grad(sdpa(q, q, q, False, None, bias), bias, do)
    assert kernels.calls[0].stride() == (160, 80, 16, 1)
    right = bias.detach().requires_grad_()
    (expected,) = torch.autograd.grad(scores(q, q, right, None).softmax(-1) @ q, right, do)
    torch.testing.assert_close(found, expected)


def test_what_is_no_number_has_no_gradient_that_is_one(kernels):
    q, bias = drawn(3, 2, 5, 8), drawn(3, 2, 5, 5)
    bias[1, 0, 2, 0] = torch.nan
    bias.requires_grad_()
    v = q.clone().requires_grad_()
    found, others = torch.autograd.grad(sdpa(q, q, v, False, None, bias), (bias, v), drawn(3, 2, 5, 8))
    assert found[1, 0, 2].isnan().all()
    assert others[1, 0].isnan().all()


def test_what_is_only_looked_at_is_pytorchs_own_call(kernels, monkeypatch):
    q, bias = drawn(3, 2, 5, 8), drawn(1, 2, 5, 5).requires_grad_()
    with torch.no_grad():
        o = sdpa(q, q, q, False, None, bias)
    assert not kernels.calls
    torch.testing.assert_close(o, scores(q, q, bias, None).softmax(-1) @ q)
    monkeypatch.setattr(learned, "_chosen", lambda *args, **options: 3)  # others than those have a rule of their own
    sdpa(q, q, q, False, None, bias)
    torch.func.vmap(lambda x: sdpa(x, x, x, False, None, bias))(drawn(2, 3, 2, 5, 8))
    assert not kernels.calls


@pytest.mark.parametrize("loss", [lambda o: o.square().sum(), lambda o: o.sum()], ids=["square", "sum"])
def test_gradients_of_gradients_are_refused_as_pytorch_refuses_them(kernels, loss):
    """Also where what arrives is a constant: a gradient that looks like one would be left out of a penalty."""
    q, bias = drawn(3, 2, 5, 8).requires_grad_(), drawn(1, 2, 5, 5).requires_grad_()
    for leaf in (q, bias):
        (first,) = torch.autograd.grad(loss(sdpa(q, q, q, False, None, bias)), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            first.sum().backward()
