"""Casts of autocast many at a time, in programs that look closer: bits, gradients and errors are PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointError, checkpoint

from tests.native.test_casts import ROUNDED, drawn, forward, nodes, numbers, region, stack


def test_a_weight_that_other_ops_use_too(both):
    def program():
        model, x, found = stack(4), numbers(3, 8), []
        for first in (True, False, True):
            with region():
                a = torch.mm(x, model[1].weight) if first else model(x)
                b = model(x) if first else torch.mm(x, model[1].weight)
            (a.float().sin().sum() + b.float().square().sum()).backward()
            found += [p.grad.clone() for p in model.parameters()]
        return found

    both(program, within=4 * ROUNDED)


def test_a_leaf_that_several_products_use(both):
    def program():
        model, x = stack(3), numbers(16, 8).requires_grad_()
        for _ in range(3):
            with region():
                y = sum(each(x).float().sin().sum() for each in model)
            y.backward()
        return x.grad

    both(program)


@pytest.mark.parametrize("grad", [True, False])
def test_a_region_that_begins_without_gradients(both, grad):
    def program():
        model, x, found = stack(4), numbers(3, 8).requires_grad_(), []
        for _ in range(3):
            model.zero_grad()
            with region():
                if grad:
                    model[0](x)
                with torch.no_grad():
                    model[:3](x)
                model(x).float().sum().backward()
            found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        return found

    both(program)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)], ids=str)
def test_gradients_of_the_gradients_of_weights(it, shape):
    def program():
        model, norm, x, found = stack(2), drawn(nn.LayerNorm(8)), numbers(*shape).requires_grad_(), []
        weights = [each.weight for each in model]
        for _ in range(3):
            with region():
                y = model[1](norm(model[0](x).float())).float().sin().sum()
            dy = torch.autograd.grad(y, weights, create_graph=True)
            found += torch.autograd.grad(sum(each.square().sum() for each in dy), [x, *weights, norm.weight])
        return found

    it.stop()
    plain = program()
    it.start(lambda name, given: (None, False, None))
    # The gradients of an x in fp32 by both ways are summed in fp32, where PyTorch sums them as autocast casts them.
    torch.testing.assert_close(program(), plain, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("which", ["tensor", "node"])
def test_hooks_see_no_gradient_that_is_none(both, which):
    def program():
        model, x, seen = stack(4), numbers(3, 8), []

        def hook(*given):
            seen.append((model[2].weight.grad if which == "node" else given[0]).clone())

        if which == "tensor":
            model[2].weight.register_hook(hook)
        else:
            node = torch.autograd.graph.get_gradient_edge(model[2].weight).node
            node.register_hook(hook)
        for step in range(6):
            with region():
                y = model[:2](x)
                z = model[2:](x) if step != 3 else y
            y.float().sum().backward()
            if z is not y:
                z.float().sum().backward()
        return seen

    both(program)


def test_a_graph_reaches_the_weights_that_it_uses(it):
    def reached(y):
        return sum(count for name, count in nodes(y).items() if "AccumulateGrad" in name)

    model, x = stack(4), numbers(3, 8)
    for _ in range(3):
        with region():
            y = model[0](x)
            assert reached(y) == 2
            assert reached(model[1:](y)) == 8


def test_weights_whose_memory_is_replaced_inside_a_region(both):
    def program():
        model, x, found = stack(4), numbers(3, 8), []
        for step in range(4):
            with region():
                y = model[0](x)
                model[1].weight.data = numbers(8, 8, seed=step)
                found.append(model[1:](y).detach())
        return found

    both(program)


def test_an_x_whose_memory_is_replaced_is_cast_again(both):
    def program():
        model, x, found = stack(2), numbers(3, 8), []
        for step in range(3):
            with region():
                y = model[0](x)
                x.data = numbers(3, 8, seed=step + 5)
                found += [y, model[1](x)]
        return [each.detach() for each in found]

    both(program)


@pytest.mark.parametrize("which", ["x", "weight", "leaf", "bias"])
def test_forward_derivatives(both, which):
    def program():
        model, x, found = stack(2), numbers(3, 8).requires_grad_(), []
        for _ in range(3):
            with forward_ad.dual_level(), region():
                made = forward_ad.make_dual
                weight, bias = model[0].weight, model[0].bias
                model(x)
                if which == "leaf":
                    weight = weight.detach().requires_grad_()
                    weight = made(weight, numbers(8, 8))
                y = F.linear(
                    made(x, numbers(3, 8)) if which == "x" else x,
                    made(weight, numbers(8, 8)) if which == "weight" else weight,
                    made(bias, numbers(8)) if which == "bias" else bias,
                )
                found += list(forward_ad.unpack_dual(y))
        return [each.detach() for each in found]

    both(program)


def test_strides_that_are_not_usual(both):
    def program():
        found = []
        weights = [nn.Parameter(numbers(8, 8).t()), nn.Parameter(numbers(8, 1).t()), nn.Parameter(numbers(8, 1))]
        inputs = [numbers(8, 1).t().requires_grad_(), numbers(5, 8).requires_grad_(), numbers(5, 1), numbers(1, 1)]
        for _ in range(3):
            for weight in weights:
                for x in inputs:
                    if x.shape[-1] == weight.shape[-1]:
                        with region():
                            y = F.linear(x, weight)
                        y.float().sin().sum().backward()
                        found += [y.detach(), weight.grad.clone()]
                        assert weight.grad.stride() == weight.stride()
        return found

    both(program)


@pytest.mark.parametrize("shapes", [((5, 7), (8, 8), (8,)), ((2, 5, 7), (8, 8), (8,)), ((5, 8), (8, 8), (7,)),
                                    ((5, 8), (8,), None), ((5, 8), (2, 8, 8), None), ((5, 8), (8, 8), (1,)),
                                    ((), (8, 8), None), ((5, 8), (0, 8), (0,)), ((5, 0), (8, 0), (8,)),
                                    ((5, 8), (8, 8), (5, 8)), ((2, 5, 7), (8, 8), None)], ids=str)  # fmt: skip
def test_errors_are_pytorchs(both, shapes):
    def program():
        found = []
        given = [None if each is None else nn.Parameter(numbers(*each)) for each in shapes]
        given[0].requires_grad_(False)
        for _ in range(3):
            with region():
                try:
                    y = F.linear(*given)
                    y.float().sum().backward()
                    found.append(str(y.shape))
                except (RuntimeError, IndexError) as broken:
                    found.append(str(broken))
        return [torch.tensor(list(map(ord, each))) for each in found]

    both(program)


def test_gradients_that_are_not_asked_for_are_not_made(it):
    model, x = stack(3), numbers(3, 8).requires_grad_()
    for _ in range(3):
        with region():
            y = model(x).float().sum()
    with torch.profiler.profile() as seen:
        torch.autograd.grad(y, x)
    names = [each.name for each in seen.events()]
    assert names.count("aten::mm") == 3
    assert not names.count("aten::_foreach_copy_")


def test_layouts_of_other_kinds(both):
    def program():
        model, found = nn.Linear(8, 8), []
        for x in (numbers(8, 8).to_sparse(), numbers(8, 8).to_sparse_csr(), numbers(8, 8).to_mkldnn()):
            try:
                with region():
                    found.append(str(model(x).layout))
            except (RuntimeError, NotImplementedError) as broken:
                found.append(str(broken))
        return [torch.tensor(list(map(ord, each))) for each in found]

    both(program)


def in_place(tensor):
    tensor.data.mul_(2)


def replaced(tensor):
    tensor.data = tensor.data * 2


def by_a_name(tensor):
    there = tensor.data
    there.mul_(2)


@pytest.mark.parametrize("change", [in_place, replaced, by_a_name])
@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_whose_data_changed_before_its_first_use_is_cast_as_it_is_then(both, change, grad):
    """As layers do that keep their weights within bounds; a version tells nothing of it."""

    def program():
        model, x, found = stack(), numbers(2, 8), []
        for _ in range(5):
            with region(), torch.set_grad_enabled(grad):
                y = model[0](x)
                change(model[1].weight)
                found.append(model[1](y).detach())
                model[2:](y)
        return found

    both(program)


def test_weights_whose_data_is_only_looked_at_are_cast_together_again(it):
    model, x = stack(), numbers(2, 8)
    for _ in range(2):
        model[1].weight.data.sum()
        casts = forward(model, x)[1]
    assert casts == 2


@pytest.mark.parametrize("change", [in_place, replaced, by_a_name])
def test_an_x_whose_data_changed_is_cast_again(both, change):
    def program():
        model, found = stack(), []
        for _ in range(3):
            with region():
                x = numbers(2, 8).clone()
                found.append(model[0](x))
                change(x)
                found.append(model[1](x))
        return [each.detach() for each in found]

    both(program)


def test_data_is_what_it_is(it):
    x = numbers(2, 8).requires_grad_()
    assert x.data.data_ptr() == x.data_ptr()
    assert not x.data.requires_grad
    x.data = torch.zeros(3)
    assert torch.equal(x.detach(), torch.zeros(3))
    for wrong in (None, 3, torch.zeros(3, dtype=torch.int64)):
        with pytest.raises((TypeError, RuntimeError)):
            x.data = wrong
    with pytest.raises(RuntimeError, match="Deleting"):
        del x.data
    assert torch.Tensor.data.__doc__ is None or isinstance(torch.Tensor.data.__doc__, str)
    assert torch.nn.Parameter(x.detach()).data.shape == (3,)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen_later", [False, True])
def test_a_layer_that_is_recomputed_after_its_weight_was_frozen_or_thawed_is_as_pytorchs(both, frozen_later, bias):
    """Who recomputes compares what is kept one by one, until it has as much as there was."""

    def program():
        layer, x = stack(1, bias=bias)[0], numbers(3, 8).requires_grad_()
        layer.weight.requires_grad_(frozen_later)
        with region():
            y = checkpoint(layer, x, use_reentrant=False)
        layer.weight.requires_grad_(not frozen_later)
        try:
            (found,) = torch.autograd.grad(y.float().square().mean(), x)
        except CheckpointError:
            return None
        return found

    assert (both(program) is None) == (bias or frozen_later)


class Inside(torch.autograd.Function):
    """Computes its layer again in its backward pass, as reversible networks do; gradients of it all go to `found`."""

    @staticmethod
    def forward(ctx, x, layer, found):
        ctx.save_for_backward(x)
        ctx.layer, ctx.found = layer, found
        with torch.no_grad(), region():
            return layer(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad(), region():
            y = ctx.layer(x)
        dx, *others = torch.autograd.grad(y, [x, *ctx.layer.parameters()], dy)
        ctx.found += others
        return dx, None, None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_layer_that_runs_inside_of_a_backward_pass_has_its_gradients(both, all_of_it, bias):
    """Whatever that pass is asked for."""

    def program():
        layer, x, found = stack(1, bias=bias)[0], numbers(3, 8).requires_grad_(), []
        for _ in range(3):
            loss = Inside.apply(x * 2, layer, found).float().square().sum()
            if all_of_it:
                x.grad = None
                loss.backward()
                found.append(x.grad)
            else:
                found += torch.autograd.grad(loss, x)
        return found

    both(program)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_recomputed_for_the_gradient_of_one_tensor(both, bias):
    def program():
        model, x, found = stack(3, bias=bias), numbers(3, 8).requires_grad_(), []
        for wanted in (x, model[0].weight, model[1].weight, model[2].weight):
            with region():
                y = checkpoint(model[2], checkpoint(model[:2], x, use_reentrant=False), use_reentrant=False)
            found += torch.autograd.grad(y.float().square().mean(), wanted)
        return found

    both(program)
