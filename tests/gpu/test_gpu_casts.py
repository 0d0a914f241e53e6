"""Casts of autocast many at a time, and products with one node, on a GPU: results of the same bits as PyTorch's own.

Gradients of fp32 tensors are sums that are rounded to fp32, and not to autocast's dtype before.
"""

import gc

import pytest
import torch
from torch import nn

import tilebook

pytestmark = pytest.mark.gpu
LAYERS = 12


@pytest.fixture(autouse=True)
def _there(extension):
    pass


def stack(width=64, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(width, width, bias=bias), nn.GELU()) for _ in range(LAYERS)], nn.LayerNorm(width)
    ).cuda()


def numbers(*shape):
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))


def both(program):
    plain = program()
    with tilebook.enabled():
        ours = program()
    torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


def region(dtype=torch.bfloat16):
    return torch.autocast("cuda", dtype)


def steps(model, x, dtype=torch.bfloat16, count=4):
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(count):
        with region(dtype):
            loss = model(x).float().square().mean()
        loss.backward()
        found += [loss.detach(), *[p.grad.clone() for p in model.parameters()]]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("shape", [(300, 64), (8, 197, 64), (2, 3, 5, 64), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_the_same(shape, bias, dtype):
    # The norm that ends a stack is dispatch's to serve: here it is left out.
    both(lambda: steps(stack(bias=bias)[:-1], numbers(*shape).requires_grad_(), dtype)[::1000])
    plain = steps(stack(bias=bias)[:-1], numbers(*shape).requires_grad_(), dtype)
    with tilebook.enabled():
        ours = steps(stack(bias=bias)[:-1], numbers(*shape).requires_grad_(), dtype)
    for its, theirs in zip(ours, plain, strict=True):
        assert (its.dtype, its.stride()) == (theirs.dtype, theirs.stride())
        below = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * its.numel() ** 0.5  # where PyTorch's end
        assert (its - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm() + below


def test_gradients_are_nearer_to_those_in_fp64_than_pytorchs():
    def gradients():
        layer = nn.Linear(192, 96).cuda()
        for index, each in enumerate(layer.parameters()):
            each.data = torch.randn(each.shape, generator=torch.Generator().manual_seed(index)).cuda() / 8
        x = numbers(5, 300, 192).requires_grad_()
        with region():
            layer(x * 1).backward(numbers(5, 300, 96).bfloat16())  # of a leaf autocast keeps a cast of its own
        return x.grad, layer.weight.grad, layer.bias.grad, layer.weight.data

    plain = gradients()
    with tilebook.enabled():
        ours = gradients()
    x, w, dy = (t.bfloat16().double() for t in (numbers(5, 300, 192), plain[3], numbers(5, 300, 96)))
    right = dy @ w, dy.flatten(0, 1).T @ x.flatten(0, 1), dy.sum((0, 1))
    for its, theirs, truth in zip(ours[:3], plain[:3], right, strict=True):
        assert its.dtype == torch.float32
        assert (its - truth).norm() < 0.1 * (theirs - truth).norm()


def test_kernels_are_fewer():
    def kernels():
        model, x = stack()[:-1], numbers(8, 197, 64)
        steps(model, x)
        with torch.profiler.profile() as seen:
            steps(model, x, count=1)
            torch.cuda.synchronize()
        return sum(
            each.name().count("copy") for each in seen.profiler.kineto_results.events() if "kernel" in each.name()
        )

    plain = kernels()
    with tilebook.enabled():
        assert kernels() <= plain - 3 * LAYERS


@pytest.mark.parametrize("begun", ["inside", "outside"])
def test_a_graph_casts_the_weights_of_its_time(begun):
    def program():
        model, x, found = stack()[:-1], numbers(8, 64), []
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                with region():
                    model(x)
        torch.cuda.current_stream().wait_stream(side)
        if begun == "outside":
            with region():
                y = model[0](x)
                with torch.cuda.graph(graph):
                    out = model[1:](y)
        else:
            with torch.cuda.graph(graph), region():
                out = model(x)
        for _ in range(2):
            for each in model.parameters():
                each.mul_(1.5)
            graph.replay()
            found.append(out.clone())
        return found

    with torch.no_grad():
        both(program)


def test_what_is_first_used_on_another_stream_is_cast_there():
    def program():
        model, x, found = stack(2048)[:-1], numbers(512, 2048), []
        side = torch.cuda.Stream()
        for _ in range(3):
            with torch.no_grad(), region():
                side.wait_stream(torch.cuda.current_stream())
                y = model[0](x)
                with torch.cuda.stream(side):
                    other = model[1:](x)
                torch.cuda.current_stream().wait_stream(side)
            found += [y.clone(), other.clone()]
        return found

    both(program)


def test_memory_is_given_back_with_the_region():
    model, x = stack(1024)[:-1], numbers(8, 1024)
    with tilebook.enabled():
        left = []
        for _ in range(4):
            before = torch.cuda.memory_allocated()
            with region():
                y = model(x)
            del y
            gc.collect()
            left.append(torch.cuda.memory_allocated() - before)
        assert left[1:] == [0, 0, 0]  # in the first, libraries may take what they keep
