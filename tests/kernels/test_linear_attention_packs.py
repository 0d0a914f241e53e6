"""Linear attention of packed sequences: what each is alone."""

import pytest
import torch

import tilebook
from tilebook import dispatch, op

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
LENGTHS = [5, 0, 1, 40, 1, 1, 19, 0]
CONFIG = {"CHUNK": 16, "BLOCK_V": 16, "WALK": 0, "STATE_V": 16, "STATE_WARPS": 4, "num_warps": 1, "num_stages": 1}


def gated(q, k, v, g, **how):
    return tilebook.gated_linear_attention(q, k, v, g, scale=0.3, **how)


def plain(q, k, v, g, **how):
    return tilebook.gated_linear_attention(q, k, v, scale=0.3, **how) + 0 * g.sum()


def normalized(q, k, v, g, **how):
    return tilebook.linear_attention(q, k, v, causal=True, **how) + 0 * g.sum()


def features(q, k, v, g, **how):
    return tilebook.linear_attention(q, k, v, feature_map="relu", causal=True, normalize=False, **how) + 0 * g.sum()


def drawn(dtype=torch.float32):
    source, n = torch.Generator().manual_seed(0), sum(LENGTHS)
    q, k, v = (torch.randn(1, 2, n, 16, generator=source).to(dtype).requires_grad_() for _ in range(3))
    g = (-torch.rand(1, 2, n, generator=source)).requires_grad_()
    return [q, k, v, g]


def apart(function, tensors):
    """Each sequence by a call of its own."""
    parts = zip(*(x.split(LENGTHS, 2) for x in tensors), strict=True)
    return torch.cat([function(*part) for part in parts if part[0].shape[2]], 2)


def both(function, tensors, ends):
    outputs = function(*tensors, cu_seqlens=ends), apart(function, tensors)
    do = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(outputs[0].dtype)
    return [(o, *torch.autograd.grad(o, tensors, do)) for o in outputs]


def ends(dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=dtype)


@pytest.mark.parametrize("function", [gated, plain, normalized, features])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_pack_is_its_sequences(function, dtype):
    tensors = [x.detach().double().requires_grad_() for x in drawn()]
    for mine, right in zip(*both(function, tensors, ends(dtype)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


@pytest.mark.sampled(2)
@interpreted
@pytest.mark.parametrize("span", [0, 1])
@pytest.mark.parametrize("function", [gated, normalized])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_forget_where_a_sequence_begins(function, dtype, span):
    tensors = drawn(dtype)
    with dispatch.use("torch"):
        _, right = both(function, [x.detach().double().requires_grad_() for x in tensors], ends())
    with dispatch.use("triton", op.Config(CONFIG | {"SPAN": span})):
        o = function(*tensors, cu_seqlens=ends())
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with dispatch.use("triton", op.Config(CONFIG)):
        found = o, *torch.autograd.grad(o, tensors, do)
    step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2e-5
    for mine, other in zip(found, right, strict=True):
        assert (mine.double() - other).abs().max() <= 6 * step * other.abs().max()


def test_a_pack_compiles_to_one_graph():
    tensors = drawn()
    compiled = torch.compile(lambda *x: gated(*x, cu_seqlens=ends()), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), gated(*tensors, cu_seqlens=ends()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0.0, 67.0])}, "integers of int32 or int64"),
        ({"cu_seqlens": torch.tensor([[0, 67]])}, r"must be \(N \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([0, 67], device="meta")}, "on meta for q"),
        ({"return_state": True}, "neither initial_state nor return_state"),
        ({"initial_state": torch.zeros(1, 2, 16, 16)}, "neither initial_state nor return_state"),
        ({"cu_seqlens": [0, 67]}, "expected a tensor, not list"),
    ],
)
def test_what_no_pack_is_is_named(change, message):
    q, k, v, _ = drawn()
    for call in (tilebook.gated_linear_attention, lambda *x, **how: tilebook.linear_attention(*x, causal=True, **how)):
        with pytest.raises(ValueError, match=message):
            call(q, k, v, **({"cu_seqlens": ends()} | change))
    with pytest.raises(ValueError, match="whose batch is 1"):
        tilebook.gated_linear_attention(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), cu_seqlens=ends())
    with pytest.raises(ValueError, match="causal=True only"):
        tilebook.linear_attention(q, k, v, cu_seqlens=ends())


@interpreted
def test_ends_that_are_none_crash_nothing():
    q, k, v, _ = (x.detach() for x in drawn())
    with dispatch.use("triton", op.Config(CONFIG | {"SPAN": 0})):
        assert tilebook.gated_linear_attention(q, k, v, cu_seqlens=torch.tensor([-7, 3, 1 << 40])).isfinite().all()
