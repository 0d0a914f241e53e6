"""An MLP block that is PyTorch's to serve: one node of autograd, and the bits and the memory of three functions."""

import gc
import itertools
import operator
import weakref

import pytest
import torch
import torch.nn.functional as F
from gate_samples import layers, numbers

import tilebook

ACTS = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu}
every_activation = pytest.mark.parametrize("activation", ACTS)


def plain(activation, x, w1, b1, w2, b2):
    return F.linear(ACTS[activation](F.linear(x, w1, b1)), w2, b2)


def leaves(needs, *shape, **how):
    return [x.requires_grad_(need) for x, need in zip(layers(*shape, **how), needs, strict=True)]


def run(gated, activation, given):
    """A call that is answered without Python."""
    gated.known(tilebook.mlp, *given, activation=activation)
    hit, y = gated.answered(tilebook.mlp, *given, activation=activation)
    assert hit
    return y


def gradients(y, given, dy):
    return torch.autograd.grad(y, [x for x in given if x.requires_grad], dy)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_activation
def test_gradients_of_any_tensors_are_pytorchs(gated, activation):
    for needs in itertools.product((False, True), repeat=5):
        given = leaves(needs)
        y, expected = run(gated, activation, given), plain(activation, *given)
        same(y, expected)
        assert y.requires_grad == any(needs)
        if any(needs):
            dy = numbers(*y.shape, seed=9)
            assert "Block" in y.grad_fn.name()
            same(gradients(y, given, dy), gradients(expected, given, dy))


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (2, 3, 8), (1, 1, 8), (2, 1, 8)], ids=str)
def test_shapes_and_dtypes_are_pytorchs(gated, activation, dtype, shape):
    x = numbers(*shape, dtype=dtype)
    others = [
        numbers(*each, seed=seed, dtype=dtype)
        for seed, each in enumerate([(12, shape[-1]), (12,), (shape[-1], 12), (shape[-1],)], start=1)
    ]
    given = [each.requires_grad_() for each in (x, *others)]
    y, expected = run(gated, activation, given), plain(activation, *given)
    same(y, expected)
    for dy in (numbers(*y.shape, seed=9, dtype=dtype), torch.ones((), dtype=dtype).expand(y.shape)):
        same(
            torch.autograd.grad(y, given, dy, retain_graph=True),
            torch.autograd.grad(expected, given, dy, retain_graph=True),
        )


UNLIKE = {
    "x is transposed": lambda x, w1, *rest: (x.t().contiguous().t(), w1, *rest),
    "a weight is transposed": lambda x, w1, *rest: (x, w1.t().contiguous().t(), *rest),
    "four axes": lambda x, *rest: (x.view(1, 1, *x.shape), *rest),
    "one axis": lambda x, *rest: (x[0].clone(), *rest),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_pytorchs_linear_does_otherwise_are_its_own_calls(gated, name):
    given = [x.detach().requires_grad_() for x in UNLIKE[name](*layers())]
    gated.known(tilebook.mlp, *given)
    y, expected = gated(tilebook.mlp, *given), plain("gelu", *given)
    same(y, expected)
    dy = numbers(*y.shape, seed=9)
    same(gradients(y, given, dy), gradients(expected, given, dy))


@every_activation
def test_under_autocast_the_bits_and_the_casts_are_pytorchs(gated, activation):
    given = leaves([True] * 5, 2, 3, 8)

    def step(function):
        with torch.autocast("cpu", torch.bfloat16):
            y = function()
            y = y + function()  # casts of weights are made once
        return y, gradients(y, given, numbers(*y.shape, seed=9, dtype=torch.bfloat16))

    for _ in range(3):
        found = step(lambda: gated(tilebook.mlp, *given, activation=activation))
    gated.here._tell("counted")
    found = step(lambda: gated(tilebook.mlp, *given, activation=activation))
    assert sum(calls for _, calls in gated.extension.gates_counted()) == 2
    expected = step(lambda: plain(activation, *given))
    assert found[0].dtype == torch.bfloat16
    block = found[0].grad_fn.next_functions[0][0]
    assert [each.variable is weight for (each, _), weight in zip(block.next_functions[1:], given[1:], strict=True)]
    same(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_under_autocast_a_frozen_bias_leaves_the_other_gradients_where_they_go(gated):
    given = leaves([True, True, False, True, True], 2, 3, 8)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = gated(tilebook.mlp, *given), plain("gelu", *given)
        wanted = [each for each in given if each.requires_grad]
        dy = numbers(*y.shape, seed=9, dtype=torch.bfloat16)
        found = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, dy), rtol=0, atol=0)
    to = [getattr(node, "variable", None) for node, _ in y.grad_fn.next_functions]
    assert [to[index] is given[index] for index in (1, 3, 4)] == [True] * 3


@every_activation
@pytest.mark.parametrize(
    "needs", [needs for needs in itertools.product((False, True), repeat=5) if any(needs)], ids=str
)
def test_gradients_can_be_differentiated_again(gated, activation, needs):
    given = leaves(needs, 2, 3, 8)
    wanted = [x for x in given if x.requires_grad]

    def twice(y):
        dy = numbers(*y.shape, seed=9).requires_grad_()
        first = torch.autograd.grad(y, wanted, dy, create_graph=True)
        total = sum((each * numbers(*each.shape, seed=11)).sum() + each.square().sum() for each in first)
        return [*first, *torch.autograd.grad(total, [*wanted, dy], allow_unused=True, materialize_grads=True)]

    found, expected = twice(run(gated, activation, given)), twice(plain(activation, *given))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@every_activation
def test_a_gradient_of_some_tensors_has_gradients_of_all(gated, activation):
    """As a penalty on the input's gradient has, which is asked for alone."""
    given = leaves([True] * 5, 2, 3, 8)

    def twice(y, asked):
        dy = numbers(*y.shape, seed=9).requires_grad_()
        first = torch.autograd.grad(y, [given[i] for i in asked], dy, create_graph=True)
        total = sum(each.square().sum() for each in first)
        return torch.autograd.grad(total, [*given, dy], allow_unused=True, materialize_grads=True)

    for count in range(1, 6):
        for asked in itertools.combinations(range(5), count):
            found, expected = twice(run(gated, activation, given), asked), twice(plain(activation, *given), asked)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text, a=asked: f"{a}: {text}")


@every_activation
def test_second_derivatives_are_those_of_the_function(gated, activation):
    given = [
        x.double().requires_grad_() for x in [*layers(2, 4)[:1], numbers(5, 4), numbers(5), numbers(4, 5), numbers(4)]
    ]
    run(gated, activation, given)

    def function(*tensors):
        return gated(tilebook.mlp, *tensors, activation=activation)

    torch.autograd.gradcheck(function, given)
    torch.autograd.gradgradcheck(function, given)
    assert gated.extension.gates_counted()


@every_activation
@pytest.mark.parametrize("frozen", [None, 1, 2, 3])
def test_what_pytorch_does_not_keep_is_not_kept(gated, activation, frozen):
    given = leaves([i != frozen for i in range(5)])

    def kept(function):
        hidden = given[0] * 1
        ref = weakref.ref(hidden)
        y = function(hidden, *given[1:])
        del hidden
        gc.collect()
        return ref() is not None and y is not None

    for _ in range(3):
        kept(lambda *tensors: gated(tilebook.mlp, *tensors, activation=activation))
    gated.here._tell("counted")
    found = kept(lambda *tensors: gated(tilebook.mlp, *tensors, activation=activation))
    assert gated.extension.gates_counted()
    assert found == kept(lambda *tensors: plain(activation, *tensors)) == (frozen != 1)


def test_an_x_that_changed_before_its_gradient_is_an_error_as_in_pytorch(gated):
    given = leaves([True] * 5)
    hidden = given[0] * 1
    y = run(gated, "gelu", [hidden, *given[1:]])
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    given[2].data.add_(1)  # nobody has kept a bias
    y = run(gated, "gelu", given)
    with torch.no_grad():
        given[2].add_(1)
        given[4].add_(1)
    y.sum().backward()


def test_a_graph_that_is_freed_says_so(gated):
    y = run(gated, "gelu", leaves([True] * 5))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


class Inside(torch.autograd.Function):
    """Computes a block again in its backward pass, as reversible networks do; gradients of it all go to `found`."""

    @staticmethod
    def forward(ctx, x, block, weights, found):
        ctx.save_for_backward(x)
        ctx.block, ctx.weights, ctx.found = block, weights, found
        return block(x, *weights)

    @staticmethod
    def backward(ctx, dy):
        given = [ctx.saved_tensors[0].detach().requires_grad_(), *ctx.weights]
        with torch.enable_grad():
            dx, *others = torch.autograd.grad(ctx.block(*given), given, dy)
        ctx.found += others
        return dx, None, None, None


@every_activation
def test_a_block_that_runs_inside_of_a_backward_pass_has_its_gradients(gated, activation):
    """Whatever that pass is asked for."""
    x, *weights = (each.requires_grad_() for each in layers())

    def step(block):
        found = []
        y = Inside.apply(x * 2, block, weights, found)
        gated.here._tell("counted")
        return [*torch.autograd.grad(y.square().sum(), x), *found]

    for _ in range(4):
        found = step(lambda *given: operator.call(tilebook.mlp, *given, activation=activation))
    assert sum(calls for _, calls in gated.extension.gates_counted()) == 1
    same(found, step(lambda *given: plain(activation, *given)))
