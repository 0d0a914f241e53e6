"""Performer's features where tokens have an order: of what comes later nothing is in them."""

import pytest
import torch
from summed_pairs import over_pairs

import tilebook
from tilebook import dispatch
from tilebook.nn.linear import attend

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")


def drawn(n, scale=1.0, width=16, seed=0):
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, width, generator=source) for _ in range(3))
    return [x.requires_grad_() for x in (scale * q, scale * k, v)]


def attended(q, k, v, **how):
    return tilebook.linear_attention(q, k, v, feature_map="performer", causal=True, **how)


def gradients(function, tensors, **how):
    o = function(*tensors, **how)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [o, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


def right(q, k, v, hidden=None):
    return over_pairs(q.double(), k.double(), v.double(), hidden, "performer", causal=True)


def truth(tensors):
    return gradients(right, [x.detach().double().requires_grad_() for x in tensors])


def assert_near(found, exact, step):
    for mine, other in zip(found, exact, strict=True):
        assert (mine.double() - other).abs().max() <= step * other.abs().max()


@interpreted
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("served", ["torch", "triton"])
def test_outputs_and_gradients_are_those_of_the_sum_over_pairs(served, scale):
    tensors = drawn(40, scale)
    with dispatch.use(served):
        found = gradients(attended, tensors)
    assert_near(found, truth(tensors), 1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0, 30.0])
def test_no_token_sees_what_comes_after_it(scale):
    q, k, v = (x.detach() for x in drawn(64, width=64))
    later = [torch.cat((x[:, :, :32], scale * x[:, :, 32:]), 2) for x in (q, k, v)]
    torch.testing.assert_close(attended(*later)[:, :, :32], attended(*(x[:, :, :32] for x in (q, k, v))))


@pytest.mark.parametrize("norm", [True, False])
def test_a_sequence_in_two_calls_is_the_sequence(norm):
    q, k, v = (x.detach() for x in drawn(50, 2.0))
    how = {"normalize": norm, "return_state": True}
    whole, last = attended(q, k, v, **how)
    _, state = attended(*(x[:, :, :20] for x in (q, k, v)), **how)
    o, end = attended(*(x[:, :, 20:] for x in (q, k, v)), initial_state=state, **how)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)
    if norm:  # else a row's weights are of no unit
        torch.testing.assert_close(o, whole[:, :, 20:], rtol=1e-4, atol=1e-5)


def test_a_pack_is_its_sequences_whatever_the_lengths_of_their_keys():
    lengths = [5, 0, 1, 20, 14]
    q, k, v = drawn(sum(lengths))
    with torch.no_grad():
        k[:, :, :5] *= 20
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    parts = [part for part in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True) if part[0].shape[2]]
    assert_near([attended(q, k, v, cu_seqlens=ends)], [torch.cat([right(*part) for part in parts], 2)], 1e-4)


@pytest.mark.parametrize("numbers", [False, True])
def test_hidden_keys_count_for_nothing(numbers):
    q, k, v = drawn(30)
    hidden = torch.rand(1, 30, generator=torch.Generator().manual_seed(0)) > 0.6
    hidden[0, 0] = False
    spoilt = [x.detach().masked_fill(hidden[:, None, :, None], torch.nan) for x in (k, v)]
    padding = torch.zeros(1, 30).masked_fill(hidden, -torch.inf) if numbers else hidden
    o = attend(q, *spoilt, padding, feature_map="performer", causal=True, eps=1e-6)
    assert_near([o], [right(q, k, v, hidden)], 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_exact_as_they_can_be(dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in drawn(60, width=32)]
    assert_near(gradients(attended, tensors), truth(tensors), 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_graph_that_is_traced_draws_nothing(mode, causal):
    """Features are the same at every call: in a graph they are numbers."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))

    def call(*qkv):
        return tilebook.linear_attention(*qkv, feature_map="performer", causal=causal)

    traced = make_fx(call, tracing_mode=mode)(q, k, v)
    for factor in (1.0, 0.7):
        given = [x * factor for x in (q, k, v)]
        for _ in range(2):
            torch.testing.assert_close(traced(*given), call(*given))
