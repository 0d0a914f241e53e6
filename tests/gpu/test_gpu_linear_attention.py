"""Linear attention on the GPU that is here: lengths that no interpreter runs, against fp64 over all pairs of tokens."""

import math

import pytest
import torch
from agreeing import agreeing

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op

pytestmark = pytest.mark.gpu


def quadratic(q, k, v, g, scale):
    """The sum over all pairs of tokens in the dtype of q, its sums in fp32 or fp64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    n = q.shape[2]
    c = g.to(wide).cumsum(-1)
    seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    a = (q @ k.mT).to(wide) * (c[..., :, None] - c[..., None, :]).masked_fill(~seen, -math.inf).exp()
    return (a.to(q.dtype) @ v) * scale


def drawn(n, *, batch=1, heads=2, width=64, dtype=torch.bfloat16, strongest=13.8, seed=0):
    source = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, n, width, device="cuda", generator=source).to(dtype) for _ in range(3))
    g = -(torch.rand(batch, heads, n, device="cuda", generator=source) ** 4) * strongest
    return [x.requires_grad_() for x in (q, k, v, g)]


def gradients(function, tensors, do, *args):
    o = function(*tensors, *args)
    return [o, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


def gated(q, k, v, g, scale):
    return tilebook.gated_linear_attention(q, k, v, g, scale=scale)


def error(mine, truth):
    return (mine.double() - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "width"), [(1, 64), (100, 64), (1000, 32), (4096, 64), (2500, 128), (700, 256), (333, 80)]
)
@pytest.mark.parametrize("strongest", [13.8, 0.01])
def test_errors_are_at_most_twice_those_of_the_quadratic_form(n, width, dtype, strongest):
    tensors = drawn(n, width=width, dtype=dtype, strongest=strongest)
    do = torch.randn_like(tensors[2])
    scale = width**-0.5
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth, plain = gradients(quadratic, wide, do, scale), gradients(quadratic, tensors, do, scale)
    with dispatch.use("triton"):
        found = gradients(gated, tensors, do, scale)
    steps = 8 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, mine, theirs, right in zip(("o", "dq", "dk", "dv", "dg"), found, plain, truth, strict=True):
        assert error(mine, right) <= 2 * error(theirs, right) + steps * right.square().mean().sqrt().item() + 1e-9, name


@pytest.mark.parametrize("decay", [1.0, 1 - 1e-4, 0.5])
def test_a_long_sequence_is_what_it_is_by_parts(decay):
    q, k, v, _ = (x.detach() for x in drawn(65536))
    g = torch.full((2,), math.log(decay), device="cuda")
    with dispatch.use("triton"):
        o, state = tilebook.gated_linear_attention(q, k, v, g, return_state=True)
        rows, at = [], None
        for part in range(0, 65536, 5000):
            cut = [x[:, :, part : part + 5000] for x in (q, k, v)]
            some, at = tilebook.gated_linear_attention(*cut, g, initial_state=at, return_state=True)
            rows.append(some)
    # In different chunks states are rounded at different places.
    torch.testing.assert_close(torch.cat(rows, 2).float(), o.float(), rtol=2e-2, atol=2e-2 * o.float().std().item())
    torch.testing.assert_close(at, state, rtol=2e-2, atol=2e-2 * state.std().item())


@pytest.mark.parametrize(
    "shape", ["B2,H4,S3000,D64,decay,initial", "B2,H4,S3000,D128,decay", "B2,H3,S2000,D64,normalized"]
)
@pytest.mark.parametrize("name", ["linear_attention_fwd", "linear_attention_bwd"])
def test_feasible_configs_agree(name, shape):
    each = op.get(name)
    problem, gpu = each.problem.parse(shape, "bf16"), devices.current()
    args = problem.inputs("cuda", 0)
    space = each.tunable.space
    right = each.tunable(*args, config=space.default(problem, gpu))
    feasible = space.feasible(problem, gpu)
    assert agreeing(each, args, feasible[:: max(1, len(feasible) // 24)], right) > 8


def test_results_repeat_bit_for_bit():
    tensors = drawn(3000, batch=4, heads=8)
    do = torch.randn_like(tensors[2])
    with dispatch.use("triton"):
        first, second = (gradients(gated, tensors, do, 0.125) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_training_keeps_no_states():
    q, k, v, g = drawn(16384, heads=4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with dispatch.use("triton"):
        o = gated(q, k, v, g, 0.125)
    assert torch.cuda.memory_allocated() - before < o.numel() * o.element_size() + (1 << 21)


def test_compiled_and_eager_are_the_same():
    tensors = drawn(500)

    def both(q, k, v, g):
        o, state = tilebook.gated_linear_attention(q, k, v, g, return_state=True)
        return o * 2, state, tilebook.linear_attention(q, k, v, causal=True)

    for mine, right in zip(torch.compile(both, fullgraph=True)(*tensors), both(*tensors), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=1e-2)


def test_a_graph_is_captured_and_replayed():
    q, k, v, g = (x.detach() for x in drawn(2048))
    with torch.no_grad():
        for _ in range(3):
            tilebook.gated_linear_attention(q, k, v, g)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = tilebook.gated_linear_attention(q, k, v, g)
        v.mul_(2)
        graph.replay()
        torch.testing.assert_close(o, tilebook.gated_linear_attention(q, k, v, g), rtol=1e-2, atol=1e-2)


def test_a_pack_is_its_sequences():
    lengths = [1000, 0, 1, 3000, 64, 37, 2]
    q, k, v, g = drawn(sum(lengths), batch=1)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda")
    do = torch.randn_like(v)
    with dispatch.use("triton"):
        whole = tilebook.gated_linear_attention(q, k, v, g, cu_seqlens=ends)
        parts = zip(*(x.split(lengths, 2) for x in (q, k, v, g)), strict=True)
        apart = torch.cat([tilebook.gated_linear_attention(*part) for part in parts if part[0].shape[2]], 2)
        found = [(o, *torch.autograd.grad(o, (q, k, v, g), do)) for o in (whole, apart)]
    for mine, right in zip(*found, strict=True):
        size = right.float().std().item()
        torch.testing.assert_close(mine.float(), right.float(), rtol=2e-2, atol=4e-2 * size)
