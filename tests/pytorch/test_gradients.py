"""Gradients are right by every way that PyTorch has to ask for them."""

import pytest
import torch
from call_samples import CALLS, every_call, inputs, layers, same
from op_samples import data, normal
from torch.autograd import forward_ad

import tilebook
from tilebook import dispatch


@pytest.mark.usefixtures("forced")
@every_call
def test_gradients_of_gradients_are_those_of_pytorchs_functions(name):
    function, args = CALLS[name][0], inputs(name, dtype=torch.float64)

    def second():
        found = torch.autograd.grad(function(*args).square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in found), args)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        same(second(), second)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("create_graph", [False, True])
def test_tensors_made_of_one_another_have_each_their_own_gradient(create_graph):
    q, w = normal(2, 4, 6, 16), normal(12, 8)
    x = normal(3, 8)

    def first():
        o = tilebook.attention(q, q, q * 2, causal=True).sum() + layers(x, w, w.t()).sum()
        return torch.autograd.grad(o, (q, w, x), create_graph=create_graph)

    same(first(), first)


@pytest.mark.usefixtures("forced")
@every_call
def test_a_batch_of_gradients_is_one_after_the_other(name):
    function, args = CALLS[name][0], inputs(name)
    y = function(*args)
    dys = torch.stack([torch.randn_like(y) for _ in range(3)])
    found = torch.autograd.grad(y, args, dys, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(y, args, dys[i], retain_graph=True)
        torch.testing.assert_close(tuple(x[i] for x in found), expected)


@pytest.mark.usefixtures("forced")
@every_call
def test_only_what_needs_a_gradient_gets_one(name):
    function, args = CALLS[name][0], inputs(name, data)
    dy = torch.randn_like(function(*args))
    for i in range(len(args)):
        given = [x.detach().requires_grad_(i == at) for at, x in enumerate(args)]
        same(torch.autograd.grad(function(*given), given[i], dy), lambda i=i, given=given: torch.autograd.grad(
            function(*given), given[i], dy
        ))  # fmt: skip


def turned(x):
    """The same numbers with their last axis first in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.ndim > 1 else torch.stack([x, x], -1)[..., 0]


def displaced(x):
    """The same numbers at an address that is no multiple of 16."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("moved", [turned, displaced])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@every_call
def test_hooks_may_give_back_what_was_saved_in_other_places(name, moved, implementation):
    half = name == "layers" and implementation == "triton"  # whose kernels take no fp32
    function, args = CALLS[name][0], inputs(name, dtype=torch.float16 if half else torch.float32)
    with dispatch.use(implementation):
        y = function(*args)
        dy = torch.randn_like(y)
        with torch.autograd.graph.saved_tensors_hooks(moved, lambda x: x):
            y = function(*args)
        found = torch.autograd.grad(y, args, dy)
    error = 0.02 if half else 2e-5
    same(found, lambda: torch.autograd.grad(function(*args), args, dy), error, error)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp", "jacfwd of grad", "hessian"])
@every_call
def test_functional_derivatives_are_right(name, transform):
    function, args = CALLS[name][0], inputs(name, data, dtype=torch.float64)

    def loss(x, *rest):
        return function(x, *rest).square().sum()

    def derive():
        x, rest = args[0], args[1:]
        if transform == "grad":
            return torch.func.grad(loss)(x, *rest)
        if transform == "vmap of grad":
            return torch.vmap(torch.func.grad(loss), (0, *[None] * len(rest)))(torch.stack([x, 2 * x]), *rest)
        if transform == "jvp":
            return torch.func.jvp(lambda x: function(x, *rest), (x,), (torch.ones_like(x),))
        directions = torch.ones_like(x)
        if transform == "jacfwd of grad":
            return torch.func.jvp(torch.func.grad(lambda x: loss(x, *rest)), (x,), (directions,))[1]
        return torch.func.vjp(torch.func.grad(lambda x: loss(x, *rest)), x)[1](directions)[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        same(derive(), derive)


@pytest.mark.usefixtures("forced")
@every_call
def test_forward_mode_derivatives_are_right(name):
    function, args = CALLS[name][0], inputs(name, data)

    def derive():
        with forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            made = [forward_ad.make_dual(x, torch.ones_like(x)) for x in args]
            return forward_ad.unpack_dual(function(*made)).tangent

    same(derive(), derive)


@pytest.mark.usefixtures("forced")
def test_learnt_slopes_have_a_gradient_and_the_op_that_has_none_says_so():
    q, slopes = normal(2, 4, 6, 16), torch.rand(4, requires_grad=True)

    def grads():
        return torch.autograd.grad(tilebook.attention(q, q, q, causal=True, alibi_slopes=slopes).sum(), (q, slopes))

    found = grads()
    assert found[1].abs().sum() > 0
    same(found, grads)
    with torch.no_grad():
        o = tilebook.attention(q, q, q, causal=True, alibi_slopes=slopes)
    torch.testing.assert_close(o, tilebook.attention(q, q, q, causal=True, alibi_slopes=slopes))
    with pytest.raises(RuntimeError, match="no gradient for alibi_slopes"):
        _op_with(q, slopes).sum().backward()


def _op_with(q, slopes):
    tensors = q, q, q, None, slopes, None
    return torch.ops.tilebook.attention_fwd(*tensors, 0.25, -1, 0, False, 0.0, 0.0, False, False)[0]
