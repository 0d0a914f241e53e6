"""Compiled programs on a GPU whose masks are constants: their numbers, gradients and kernels."""

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import graphs

pytestmark = pytest.mark.gpu


def places(n):
    return torch.arange(n, device="cuda")


def causal(n):
    return (places(n) <= places(n)[:, None])[None, None]


def window(n, left=255):
    return causal(n) & (places(n) > places(n)[:, None] - left - 1)


def repeated(x, n):
    batch, heads, rows, width = x.shape
    return x[:, :, None, :, :].expand(batch, heads, n, rows, width).reshape(batch, heads * n, rows, width)


def attend(q, k, v, mask):
    n = q.shape[1] // k.shape[1]
    k, v = (repeated(x, n) if n > 1 else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[2]))


@pytest.fixture
def changed(monkeypatch):
    found, simplified = [], graphs.simplified
    monkeypatch.setattr(graphs, "simplified", lambda module: found.append(simplified(module)) or found[-1])
    torch.compiler.reset()
    with tilebook.enabled():
        yield found
    torch.compiler.reset()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(("mask", "n"), [(causal, 512), (causal, 197), (window, 8192)])
def test_numbers_and_gradients_are_those_with_the_mask(changed, mask, n, heads, autocast):
    generator, dtype = torch.Generator("cuda").manual_seed(0), torch.float32 if autocast else torch.bfloat16
    leaves = [
        torch.randn(2, each, n, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
        for each in (heads[0], heads[1], heads[1])
    ]
    do = torch.randn(2, heads[0], n, 64, device="cuda", generator=generator)

    def run(function):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            o = function(*leaves, mask)
        return [o, *torch.autograd.grad(o, leaves, do.to(o.dtype))]

    expected = run(attend)
    for _ in range(2):
        found = run(torch.compile(attend))
        for got, right in zip(found, expected, strict=True):
            assert got.dtype == right.dtype
            size = right.float().abs().max().item()
            torch.testing.assert_close(got.float(), right.float(), rtol=0, atol=0.02 * size)
    assert changed == [1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8)])
def test_lengths_that_are_not_known_yet(changed, heads, padded):
    def attend_together(qkv, mask):  # so that their lengths are one size
        return attend(*qkv.split((heads[0], heads[1], heads[1]), dim=1), mask)

    run = torch.compile(attend_together)
    for n in (2048, 1500, 3001):
        qkv = torch.randn(4, heads[0] + 2 * heads[1], n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        seen = places(n) < torch.tensor([[n], [n // 2], [n // 3], [n]], device="cuda")
        mask = (lambda n, seen=seen: causal(n) & seen[:, None, None]) if padded else causal
        found, right = run(qkv, mask), attend_together(qkv, mask)
        do = torch.randn_like(right)
        pairs = zip(*((o, *torch.autograd.grad(o, qkv, do)) for o in (found, right)), strict=True)
        for got, expected in pairs:
            limit = 0.02 * expected.float().abs().max().item()
            torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=limit)
    assert set(changed) == {1}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("heads", [(16, 16), (16, 4)])
@pytest.mark.parametrize(("limits", "n"), [(causal, 2048), (window, 4096)])
def test_padding_beside_limits_gives_the_numbers_of_the_mask(changed, limits, n, heads, autocast):
    generator, dtype = torch.Generator("cuda").manual_seed(0), torch.float32 if autocast else torch.bfloat16
    leaves = [
        torch.randn(4, each, n, 64, device="cuda", generator=generator).to(dtype).requires_grad_()
        for each in (heads[0], heads[1], heads[1])
    ]
    padding = places(n) < torch.tensor([[n], [n // 2 + 5], [n // 3], [n - 1]], device="cuda")
    # Of rows that see nothing PyTorch's kernels make one thing or another, and ours 0.
    some = (limits(n) & padding[:, None, None]).any(-1, keepdim=True)
    do = torch.randn(4, heads[0], n, 64, device="cuda", generator=generator) * some

    def run(function):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            o = function(*leaves, lambda n: limits(n) & padding[:, None, None]) * some
        return [o, *torch.autograd.grad(o, leaves, do.to(o.dtype))]

    for got, right in zip(run(torch.compile(attend)), run(attend), strict=True):
        assert got.dtype == right.dtype
        torch.testing.assert_close(got.float(), right.float(), rtol=0, atol=0.02 * right.float().abs().max().item())
    assert changed == [1]


def test_a_causal_mask_costs_a_compiled_program_neither_time_nor_memory(changed):
    q, k, v = (torch.randn(4, heads, 2048, 64, device="cuda", dtype=torch.bfloat16) for heads in (16, 4, 4))
    run = torch.compile(attend)
    run(q, k, v, causal)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(q, k, v, causal)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2 * q.nbytes
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "Memset" not in name]) == 1, kernels
