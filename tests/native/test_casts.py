"""Casts of autocast, many at a time, and products with one node: whatever a program does, the bits are PyTorch's.

Where a weight is used more than once, its gradients are added up in fp32, and not in autocast's dtype.
"""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

LAYERS = 12


def region(dtype=torch.bfloat16, **options):
    return torch.autocast("cpu", dtype, **options)


def numbers(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(model):
    """The model, with numbers that no other thread has a part in."""
    for index, each in enumerate(model.parameters()):
        each.data = numbers(*each.shape, seed=index) / 3
    return model


def stack(layers=LAYERS, width=8, bias=True):
    return drawn(nn.Sequential(*[nn.Linear(width, width, bias=bias) for _ in range(layers)]))


def trained(model, x, steps=4, inside=region, called=None):
    """Gradients and losses of a few steps."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        with inside():
            loss = (called or model)(x).float().square().mean()
        loss.backward()
        found += [loss.detach(), *[None if p.grad is None else p.grad.clone() for p in model.parameters()]]
        optimizer.step()
        optimizer.zero_grad()
    return found


def nodes(y):
    """How many nodes of each name a graph has."""
    found, seen, ahead = {}, set(), [y.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = "Product" if "Product" in node.name() else node.name()
        found[name] = found.get(name, 0) + 1
        ahead += [each for each, _ in node.next_functions]
    return found


def forward(model, x):
    """What a region gives, and how many times it casts."""
    with torch.profiler.profile() as seen, region():
        y = model(x)
    return y, sum(each.name == "aten::_foreach_copy_" for each in seen.events())


ROUNDED = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8), (8,), (0, 8), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_the_same(both, shape, bias, dtype):
    both(lambda: trained(stack(bias=bias), numbers(*shape).requires_grad_(), inside=lambda: region(dtype)))


def test_from_the_second_region_on_weights_are_cast_together_and_a_product_is_one_node(it):
    model, x = stack(), numbers(2, 5, 8)
    found = [forward(model, x) for _ in range(3)]
    assert [casts for _, casts in found] == [24, 2, 2]  # weights and biases, sixteen at most
    counts = [nodes(y) for y, _ in found]
    assert [each["Product"] for each in counts] == [LAYERS] * 3
    assert set(counts[-1]) == {"Product", "torch::autograd::AccumulateGrad"}  # of the weights themselves


def test_what_is_cast_lives_as_long_as_the_region(it):
    model, x, kept = stack(), numbers(2, 8), []
    for _ in range(2):
        with region():
            model(x)
    with region():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(weakref.ref(t)) or t, lambda t: t):
            model(x)
        gc.collect()
        assert sum(each() is not None for each in kept) == LAYERS - 1  # the first has no use for its weight
    gc.collect()
    assert not any(each() is not None for each in kept)


class Attended(nn.Module):
    """Three products of one x, and a residual."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.v = (
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8, bias=False),
        )
        drawn(self)

    def forward(self, x):
        y = self.norm(x)
        return x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))


def test_products_of_one_x_share_its_cast(it, both):
    both(lambda: trained(Attended(), numbers(2, 5, 8).requires_grad_()))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), region():
        Attended()(numbers(2, 5, 8))
    factors = [t for t in kept if t.dtype == torch.bfloat16 and t.shape == (2, 5, 8)]
    assert len({t.data_ptr() for t in factors}) < len(factors)


def test_an_x_that_changed_in_between_is_cast_again(both):
    def program():
        model, x = Attended(), numbers(2, 5, 8)
        found = []
        for _ in range(3):
            with region():
                y = x.clone()
                found.append(model.q(y))
                y.add_(1)
                found.append(model.k(y))
        return [each.detach() for each in found]

    both(program)


def test_a_weight_that_changed_before_its_first_use_is_cast_as_it_is_then(both):
    def program():
        model, x, found = stack(), numbers(2, 8), []
        for _ in range(3):
            with region():
                y = model[0](x)
                with torch.no_grad():
                    model[1].weight.mul_(2)
                found.append(model[1](y).detach())
                with torch.no_grad():
                    model[1].weight.mul_(2)  # after it, PyTorch's own cast is as old
                found.append(model[1](y).detach())
                model[2:](y)
        return found

    both(program)


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.calls = stack(4), 0

    def forward(self, x):
        self.calls += 1
        for index, each in enumerate(self.layers):
            if index != 2 or self.calls % 3 == 0:
                x = each(x)
        return x


def test_a_weight_without_use_has_no_gradient(it, both):
    both(lambda: trained(Sometimes(), numbers(2, 8), steps=9))
    model, x = Sometimes(), numbers(2, 8)
    casts = [forward(model, x)[1] for _ in range(15)]
    assert casts[-1] == 2  # those that are always there, and those that are not


def test_frozen_shared_and_accumulated(both):
    def program():
        model = stack(6)
        model[1].weight.requires_grad_(False)
        model[3].weight = model[4].weight
        x, found = numbers(2, 3, 8), []
        for step in range(6):
            with region():
                (model(x).float() * (step + 1)).sum().backward()
            if step % 2:
                found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                model.zero_grad()
        return found

    both(program, within=ROUNDED)


def test_without_gradients_first_and_then_with(it):
    model, x = stack(), numbers(2, 8)
    for _ in range(3):
        with region():
            with torch.no_grad():
                model(x)
            y = model(x)
        y.float().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()


@pytest.mark.parametrize("inside", [torch.no_grad, torch.inference_mode])
def test_without_gradients(both, inside):
    def program():
        model, found = stack(), []
        for _ in range(3):
            with inside(), region():
                found.append(model(numbers(2, 8)).float().clone())
        return found

    both(program)


def test_without_autocasts_cache_each_is_pytorchs(it, both):
    both(lambda: trained(stack(), numbers(2, 8), inside=lambda: region(cache_enabled=False)))
    with region(cache_enabled=False):
        assert "Together" not in nodes(stack()(numbers(2, 8)))


def test_regions_inside_regions(both):
    def program():
        model, found = stack(), []
        for _ in range(3):
            with region():
                y = model[:4](numbers(2, 8))
                with torch.autocast("cpu", enabled=False):
                    y = model[4:6](y.float())
                with region():
                    y = model[2:8](y)
            found.append(y.detach())
        return found

    both(program)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(both, reentrant):
    def program():
        model = stack()
        halves = model[:6], model[6:]

        def called(x):
            for each in halves:
                x = checkpoint(each, x, use_reentrant=reentrant)
            return x

        return trained(model, numbers(2, 3, 8).requires_grad_(), called=called)

    both(program)


def test_gradients_of_gradients(both):
    def program():
        model, x, found = stack(4), numbers(2, 3, 8).requires_grad_(), []
        for _ in range(3):
            with region():
                y = torch.tanh(model(x)).float().sum()
            (dx,) = torch.autograd.grad(y, x, create_graph=True)
            found += torch.autograd.grad(dx.square().sum(), [x, *[p for p in model.parameters() if p.ndim == 2]])
        return found

    both(program, within=ROUNDED)


def test_saved_tensors_may_be_packed(both):
    def program():
        inside = torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.to(torch.bfloat16))
        model, x = Attended(), numbers(2, 5, 8)
        y = None
        for _ in range(3):
            model.zero_grad()
            with region():
                normed = model.norm(x)
                with inside:
                    y = model.q(normed) * 1.0
            y.float().sum().backward()
        return [model.q.weight.grad, model.q.bias.grad]

    both(program)


def test_transforms_modes_and_traces_see_pytorchs(it, both):
    model, x = stack(4), numbers(2, 3, 8)

    def called(x):
        with region():
            return model(x)

    def traced():
        with region():
            return torch.jit.trace(model, x, check_trace=False)(x + 1).detach()

    for _ in range(2):
        called(x)
    both(lambda: torch.func.vmap(called)(x))
    both(lambda: torch.func.grad(lambda x: called(x).float().sum())(x))
    both(lambda: torch.func.jvp(called, (x,), (x,)))
    both(traced)
    assert "linear" in str(make_fx(called)(x).graph) or "addmm" in str(make_fx(called)(x).graph)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert called(mode.from_tensor(x)).shape == x.shape
    compiled = torch.compile(called, backend="aot_eager", fullgraph=True)
    both(lambda: compiled(x).detach())


def test_threads(both):
    def program():
        results = {}

        def work(index):
            results[index] = trained(stack(), numbers(index + 1, 8))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return [results[index] for index in range(3)]

    both(program)


def test_weights_whose_memory_is_replaced_or_gone(both):
    def program():
        model, x, found = stack(6), numbers(2, 8), []
        for step in range(6):
            with region():
                found.append(model(x).detach())
            if step == 2:
                model[3].weight.data = numbers(8, 8)
                whole = model[4].weight.data
                model[4].weight.data = torch.empty(0)
                with region():
                    model[:4](x)
                model[4].weight.data = whole
            if step == 3:
                model = nn.Sequential(*model[:3], *stack(2))
        return found

    both(program)


def test_addmm_of_weights(both):
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(numbers(8, 8)), nn.Parameter(numbers(8))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    both(lambda: trained(nn.Sequential(*[Convolution() for _ in range(4)]), numbers(5, 8)))


def test_off_it_is_pytorchs(it):
    model, x = stack(), numbers(2, 8)
    for _ in range(2):
        with region():
            model(x)
    it.stop()
    with region():
        assert not {"Together", "Product"} & set(nodes(model(x)))
