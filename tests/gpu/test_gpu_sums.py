"""Additions and sums of rows on a GPU: PyTorch's numbers, dtypes and strides, by launches that the host repeats."""

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook.kernels.addition.ops import add_fwd
from tilebook.kernels.addition.problem import Problem
from tilebook.kernels.bias.ops import bias_bwd

pytestmark = pytest.mark.gpu
B, S, N = 64, 197, 768


def _turned(dtype=torch.float32):
    return torch.randn(B, N, S, device="cuda").to(dtype).mT


def _plain(dtype=torch.float32):
    return torch.randn(B, S, N, device="cuda").to(dtype)


FORMS = {
    "fp32 + bf16": lambda: (_plain(), _plain(torch.bfloat16)),
    "bf16 + fp32": lambda: (_plain(torch.bfloat16), _plain()),
    "fp32 + fp16": lambda: (_plain(), _plain(torch.float16)),
    "the first turned": lambda: (_turned(), _plain(torch.bfloat16)),
    "the second turned": lambda: (_plain(), _turned()),
    "channels last": lambda: (
        torch.randn(8, 64, 56, 56, device="cuda").to(memory_format=torch.channels_last),
        torch.randn(8, 64, 56, 56, device="cuda"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_sums_are_pytorchs_forward_and_backward(below, form):
    x, y = (each.requires_grad_() for each in FORMS[form]())
    above = torch.randn_like(x, dtype=torch.float32)
    plain = x + y
    right = (plain, *torch.autograd.grad(plain, (x, y), above))
    with tilebook.enabled():
        found = []
        for _ in range(6):
            total = x + y
            found.append((total, *torch.autograd.grad(total, (x, y), above)))
    assert below.repeated("add_fwd") >= 2
    for each in found:
        torch.testing.assert_close(each, right, rtol=0, atol=0)
        assert [t.stride() for t in each] == [t.stride() for t in right]


def test_a_graph_replays_it(below):
    x, y = _plain(), _plain(torch.bfloat16)
    with tilebook.enabled():
        for _ in range(6):
            x + y
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total = x + y
    x.mul_(2)
    y.mul_(3)
    graph.replay()
    torch.testing.assert_close(total, x + y.float(), rtol=0, atol=0)


@pytest.mark.parametrize("op", [add_fwd, bias_bwd], ids=lambda op: op.name)
def test_feasible_configs_are_right(op):
    for problem in op.problem.examples():
        args = problem.inputs("cuda", 0)
        right = op.reference(*(each.double() for each in args)).double()
        feasible = op.tunable.space.feasible(problem, devices.current())
        for config in feasible[:: max(1, len(feasible) // 12)]:
            found = op.tunable(*args, config=config)
            found = found[0] if isinstance(found, tuple) else found
            torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-3 * right.abs().max().item())


def test_more_numbers_than_32_bits_count():
    problem = Problem.parse("B1,S2100000,N1024,fp32", "bf16")
    x, y = torch.ones(2, problem.rows * problem.width, device="cuda", dtype=torch.bfloat16).unbind()
    y = y[: 1 << 20].float().repeat(problem.rows * problem.width // (1 << 20) + 1)[: x.numel()]
    config = add_fwd.tunable.space.default(problem, devices.current())
    found = add_fwd.tunable(x, y, config=config)
    found = found[0] if isinstance(found, tuple) else found
    assert bool((found == 2).all())
