"""Gated linear attention with decays by channel on the GPU that is here: lengths that no interpreter runs."""

import pytest
import torch
from agreeing import assert_rounded_otherwise, feasible_agreeing

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.kernels.channel_decay.pytorch import chunked

pytestmark = pytest.mark.gpu
NAMES = "o", "state", "dq", "dk", "dv", "dg", "dinitial_state"


def drawn(n, *, batch=1, heads=2, width=64, columns=None, dtype=torch.bfloat16, strongest=13.8, seed=0):
    """q, k, v, log-decays and a state, which want gradients."""
    source = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, heads, *shape, device="cuda", generator=source)

    q, k, v = normal(n, width), normal(n, width), normal(n, columns or width)
    g = -(torch.rand(batch, heads, n, width, device="cuda", generator=source) ** 4) * strongest
    state = normal(width, columns or width)
    return [x.requires_grad_() for x in (*(x.to(dtype) for x in (q, k, v)), g, state)]


def gated(q, k, v, g, state):
    return tilebook.gated_linear_attention(q, k, v, g, initial_state=state, return_state=True)


def plain(q, k, v, g, state):
    return chunked(q, k, v, g, state, q.shape[-1] ** -0.5)


def results(function, tensors, above):
    made = function(*tensors)
    return [*made, *torch.autograd.grad(made, tensors, [x.to(y.dtype) for x, y in zip(above, made, strict=True)])]


def rms(x):
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "width", "columns"),
    [(1, 64, 64), (100, 64, 64), (4096, 64, 64), (2500, 128, 128), (700, 256, 128), (333, 80, 40)],
)
@pytest.mark.parametrize("strongest", [13.8, 0.01])
def test_errors_are_at_most_twice_those_of_the_same_chunks_in_pytorch(n, width, columns, dtype, strongest):
    tensors = drawn(n, width=width, columns=columns, dtype=dtype, strongest=strongest)
    above = [torch.randn_like(tensors[2]), torch.randn_like(tensors[4])]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth, theirs = (results(plain, each, above) for each in (wide, tensors))
    with dispatch.use("triton"):
        found = results(gated, tensors, above)
    steps = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name, mine, other, right in zip(NAMES, found, theirs, truth, strict=True):
        assert rms(mine - right) <= 2 * rms(other - right) + steps * rms(right) + 1e-9, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decays_that_are_all_strong_are_right(dtype):
    tensors = drawn(1000, dtype=dtype)
    with torch.no_grad():
        tensors[3].fill_(-13.8)
    above = [torch.randn_like(tensors[2]), torch.randn_like(tensors[4])]
    truth = results(plain, [x.detach().double().requires_grad_() for x in tensors], above)
    with dispatch.use("triton"):
        found = results(gated, tensors, above)
    steps = 4 if dtype == torch.bfloat16 else 64  # exponents of 20, of decays by the chunk, are rounded themselves
    for name, mine, right in zip(NAMES, found, truth, strict=True):
        assert rms(mine - right) <= steps * torch.finfo(dtype).eps * rms(right), name


def test_a_long_sequence_is_what_it_is_by_parts_and_by_steps():
    q, k, v, g, state = (x.detach() for x in drawn(20000))
    with dispatch.use("triton"):
        o, last = gated(q, k, v, g, state)
        rows, at = [], state
        for part in range(0, 20000, 3000):
            some, at = gated(*(x[:, :, part : part + 3000] for x in (q, k, v, g)), at)
            rows.append(some)
    torch.testing.assert_close(torch.cat(rows, 2).float(), o.float(), rtol=5e-2, atol=5e-2 * o.float().std().item())
    torch.testing.assert_close(at, last, rtol=2e-2, atol=2e-2 * last.std().item())
    for t in range(100):
        row = (x[:, :, t] for x in (q, k, v))
        one, state = tilebook.linear_attention_step(*row, state, g[:, :, t])
        torch.testing.assert_close(one.float(), o[:, :, t].float(), rtol=2e-2, atol=4e-2 * o.float().std().item())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [("B2,H4,S3000,D64,initial", "bf16"), ("B2,H4,S3000,D128", "bf16"), ("B2,H4,S900,D128,V64", "fp16")],
)
@pytest.mark.parametrize("name", ["channel_decay_fwd", "channel_decay_bwd"])
def test_feasible_configs_agree(name, shape, dtype):
    assert feasible_agreeing(name, shape, dtype, 16) > 6


def test_results_repeat_bit_for_bit():
    tensors = drawn(3000, batch=4, heads=8)
    above = [torch.randn_like(tensors[2]), torch.randn_like(tensors[4])]
    with dispatch.use("triton"):
        first, second = (results(gated, tensors, above) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_training_keeps_no_states():
    tensors = drawn(16384, heads=4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with dispatch.use("triton"):
        o, state = gated(*tensors)
    assert torch.cuda.memory_allocated() - before < o.nbytes + state.nbytes + (1 << 21)


def test_compiled_and_eager_are_the_same():
    tensors = drawn(500)
    compiled = torch.compile(lambda *x: tuple(2 * y for y in gated(*x)), fullgraph=True)
    for mine, right in zip(compiled(*tensors), gated(*tensors), strict=True):
        torch.testing.assert_close(mine, 2 * right, rtol=1e-2, atol=1e-2)


def test_a_graph_is_captured_and_replayed():
    tensors = [x.detach() for x in drawn(2048)]
    with torch.no_grad():
        for _ in range(3):
            gated(*tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o, _ = gated(*tensors)
        tensors[2].mul_(2)
        graph.replay()
        torch.testing.assert_close(o, gated(*tensors)[0], rtol=1e-2, atol=1e-2)


def test_a_pack_is_its_sequences():
    lengths = [1000, 0, 1, 3000, 64, 37, 2]
    *tensors, _ = drawn(sum(lengths))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda")
    above = torch.randn_like(tensors[2])
    with dispatch.use("triton"):
        whole = tilebook.gated_linear_attention(*tensors, cu_seqlens=ends)
        parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
        apart = torch.cat([tilebook.gated_linear_attention(*part) for part in parts if part[0].shape[2]], 2)
        found = [(o, *torch.autograd.grad(o, tensors, above)) for o in (whole, apart)]
    for mine, right in zip(*found, strict=True):  # chunks begin elsewhere
        assert_rounded_otherwise(mine, right)


def test_flash_linear_attention_agrees():
    """Of both directions, where `fla-core` is installed."""
    pytest.importorskip("fla")
    for name in ("channel_decay_fwd", "channel_decay_bwd"):
        each = op.get(name)
        args = each.problem.parse("B2,H4,S3000,D128,initial", "bf16").inputs("cuda", 0)
        for mine, other in zip(
            each.tunable(*args, config=each.tunable.space.default(each.problem.of(*args), devices.current())),
            each.implementations["fla"](*args),
            strict=True,
        ):
            torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=3e-2 * mine.float().abs().max().item())
