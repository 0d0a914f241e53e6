"""Gated linear attention with decays by channel: by chunks in PyTorch and in the kernels, against fp64."""

import math

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.kernels.channel_decay.pytorch import chunked, gradients
from tilebook.launch import intercepted

FWD, BWD = (op.get(name) for name in ("channel_decay_fwd", "channel_decay_bwd"))
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
BASE = {
    "CHUNK": 16, "PAIR_WARPS": 1, "BLOCK_V": 16, "SPAN": 0, "WALK": 0, "STATE_V": 16, "STATE_WARPS": 4, "num_warps": 1,
    "num_stages": 1, "SLICE": 16,
}  # fmt: skip
MORE = ({}, {"CHUNK": 32, "SPAN": 1, "SLICE": 32}, {"SPAN": 2, "WALK": 2, "BLOCK_V": 32, "SLICE": 32})
CONFIGS = [op.Config(BASE | more) for more in MORE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def own(config, each):
    """Those of a config's axes that a direction has."""
    return None if config is None else op.Config({x: n for x, n in config.items() if x in each.tunable.space.axes})


def token_by_token(q, k, v, g, state, *, scale=1.0):
    """(o, state) as the recurrence is written down."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        state = state * g[:, :, t, :, None].clamp(min=-100).exp() + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, 2) * scale, state


def quadratic(q, k, v, g, state, *, scale=1.0):
    """(o, state) by weights of all pairs of tokens, which alone are rounded, and the state, as factors of products."""
    wide = torch.promote_types(q.dtype, torch.float32)
    c = g.to(wide).clamp(min=-100).cumsum(2)
    apart = c[:, :, :, None] - c[:, :, None]
    seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[..., None]
    pairs = q.to(wide)[:, :, :, None] * k.to(wide)[:, :, None] * apart.masked_fill(~seen, -torch.inf).exp()
    o = (pairs.sum(-1) * scale).to(q.dtype) @ v
    last = (k * (c[:, :, -1:] - c).exp()).to(k.dtype).mT @ v
    if state is not None:
        o = o.to(wide) + ((q * c.exp() * scale).to(q.dtype) @ state.to(q.dtype)).to(wide)
        last = last.to(wide) + state * c[:, :, -1].exp()[..., None]
    return o.to(v.dtype), last.to(wide)


def drawn(n, *, heads=1, width=16, columns=16, dtype=torch.float32, state=True, decay=None, seed=0):
    """q, k, v, log-decays from 1 down to 1e-6, or all `decay`, and a state; they want gradients."""
    source = torch.Generator().manual_seed(seed)
    q, k, v, h = (
        torch.randn(1, heads, *shape, generator=source)
        for shape in ((n, width), (n, width), (n, columns), (width, columns))
    )
    g = -(torch.rand(1, heads, n, width, generator=source) ** 4) * 13.8
    g = g if decay is None else torch.full_like(g, decay)
    found = *(x.to(dtype) for x in (q, k, v)), g, h if state else None
    return [x if x is None else x.requires_grad_() for x in found]


def exact(tensors):
    return [x if x is None else x.detach().double().requires_grad_() for x in tensors]


def gated(q, k, v, g, state, *, scale=1.0):
    """(o, state) of the public function."""
    return tilebook.gated_linear_attention(q, k, v, g, scale=scale, initial_state=state, return_state=True)


def plain(q, k, v, g, state, *, scale=1.0):
    return chunked(q, k, v, g, state, scale)


def results(function, tensors, *, config=None, dtype=None, **how):
    """o, the state, and the gradients of all tensors that are there. dtype: what the gradient of o is rounded to."""
    with dispatch.use("triton", own(config, FWD)) if function is gated else dispatch.use("torch"):
        made = function(*tensors, **how)
    above = [torch.sin(0.7 * torch.arange(x.numel(), dtype=torch.float64)).view(x.shape) for x in made]
    above[0] = above[0].to(dtype or made[0].dtype)
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    with dispatch.use("triton", own(config, BWD)) if function is gated else dispatch.use("torch"):
        grads = torch.autograd.grad(made, wanted, [x.to(y.dtype) for x, y in zip(above, made, strict=True)])
    return [*made, *grads]


def truth(tensors, **how):
    return results(token_by_token, exact(tensors), dtype=tensors[0].dtype, **how)


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_as_good(found, theirs, right):
    """RMS errors of at most twice those of the quadratic form in the same dtype, and a rounding step."""
    steps = torch.finfo(found[0].dtype).eps
    for at, (mine, other, exactly) in enumerate(zip(found, theirs, right, strict=True)):
        assert mine.dtype == other.dtype
        assert rms(mine - exactly) <= 2 * rms(other - exactly) + steps * rms(exactly) + 1e-9, at


def assert_near(found, right, steps=2e-5):
    for mine, exactly in zip(found, right, strict=True):
        size = exactly.abs().max().item() if exactly.numel() else 0.0
        torch.testing.assert_close(mine.double(), exactly.double(), rtol=0, atol=steps * size + 1e-7)


@pytest.mark.parametrize(("n", "state"), [(1, False), (64, True), (65, False), (130, True)])
def test_by_chunks_in_pytorch_it_is_the_recurrence(n, state):
    tensors = exact(drawn(n, heads=2, columns=12, state=state))
    assert_near(results(plain, tensors, scale=0.3), truth(tensors, scale=0.3), 1e-11)


def test_its_gradients_in_pytorch_are_those_of_differences():
    tensors = exact(drawn(5, width=3, columns=2))
    torch.autograd.gradcheck(lambda *x: plain(*x, scale=0.5), tensors)
    without = [*tensors[:3], torch.zeros(1, 1, 5, 3, dtype=torch.float64, requires_grad=True), tensors[4]]
    torch.autograd.gradcheck(lambda *x: plain(*x, scale=0.5), without)  # decays of nothing have gradients too
    do = torch.randn(1, 1, 5, 2, dtype=torch.float64)
    made = gradients(do, None, *tensors, 0.5, True)
    assert_near(made, torch.autograd.grad(plain(*tensors, scale=0.5)[0], tensors, do), 1e-12)


@pytest.mark.sampled(2)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [None, -13.8, 0.0])
def test_errors_are_at_most_twice_those_of_the_quadratic_form(decay, dtype):
    tensors = drawn(40, dtype=dtype, decay=decay, seed=1)
    found = results(gated, tensors, config=CONFIGS[1], scale=0.25)
    assert_as_good(found, results(quadratic, tensors, scale=0.25), truth(tensors, scale=0.25))


@interpreted
def test_all_configs_agree_with_each_other_and_with_one_token_after_the_other():
    tensors = drawn(34, width=20, columns=18)
    q, k, v, g, state = (x.detach() for x in tensors)
    rows = []
    for t in range(34):
        row = (x[:, :, t] for x in (q, k, v))
        o, state = tilebook.linear_attention_step(*row, state, g[:, :, t], scale=0.2)
        rows.append(o)
    right = results(plain, exact(tensors), dtype=torch.float32, scale=0.2)
    assert_near((torch.stack(rows, 2), state), right[:2])
    for config in CONFIGS[1:]:
        assert_near(results(gated, tensors, config=config, scale=0.2), right, 2e-6)


@interpreted
@pytest.mark.parametrize("width", [48, 80])
def test_widths_between_powers_of_two_are_right_by_slices_that_divide_them(width):
    tensors = drawn(20, heads=2, width=width)
    assert_near(results(gated, tensors, config=CONFIGS[0], scale=0.2), truth(tensors, scale=0.2))


@interpreted
@pytest.mark.parametrize("decay", [-30.0, -math.inf])
def test_strong_decays_make_nothing_that_is_not_finite(decay):
    tensors = drawn(20, decay=decay)
    with torch.no_grad():
        tensors[3][..., ::2, ::2] = 0.0  # beside channels and tokens that keep all
    assert_near(results(gated, tensors), truth(tensors))


@pytest.mark.parametrize("function", [plain, pytest.param(gated, marks=interpreted)])
def test_decays_that_are_all_strong_have_gradients_as_small(function):
    tensors = drawn(40, decay=-13.8)
    found, right = results(function, tensors)[5], truth(tensors)[5]
    assert rms(found - right) <= 1e-4 * rms(right)


@interpreted
def test_a_strong_decay_has_a_gradient_as_small_as_what_passes_it():
    """Pairs behind it add to its sum and take away again, a million times as much."""
    tensors = drawn(16, state=False)
    with torch.no_grad():
        tensors[3].fill_(-0.01)
        tensors[3][:, :, 8] = -13.8
    for dtype in (torch.float32, torch.bfloat16):
        some = [
            x if x is None else x.detach().to(dtype if at < 3 else x.dtype).requires_grad_()
            for at, x in enumerate(tensors)
        ]
        found, right = results(gated, some)[5][:, :, 8], truth(some)[5][:, :, 8]
        assert rms(found - right) <= 0.1 * rms(right) + 1e-6


@interpreted
def test_a_sequence_in_two_calls_is_the_sequence_with_its_gradients():
    def in_two(*tensors):
        *rows, state = tensors
        first, state = gated(*(x[:, :, :11] for x in rows), state)
        second, state = gated(*(x[:, :, 11:] for x in rows), state)
        return torch.cat((first, second), 2), state

    tensors = drawn(16)
    with dispatch.use("triton"):
        parts = in_two(*tensors)
        above = [torch.randn_like(x) for x in parts]
        grads = torch.autograd.grad(parts, tensors, above)
        whole = gated(*tensors)
        assert_near((*parts, *grads), (*whole, *torch.autograd.grad(whole, tensors, above)))
        alone = torch.autograd.grad(gated(*tensors)[1].sum(), tensors[1:])
    wide = exact(tensors)
    assert_near(alone, torch.autograd.grad(plain(*wide)[1].sum(), wide[1:]))


@interpreted
def test_tensors_are_taken_as_they_lie_and_results_repeat_bit_for_bit():
    tensors = drawn(15)
    right = results(gated, tensors)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors[:4]]
    columns = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    for lying in (tensors, [*turned[:3], columns[3], columns[4]]):
        for mine, other in zip(results(gated, lying), right, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


@interpreted
def test_decays_of_each_channel_alone_are_those_of_all_tokens_and_it_differentiates_again():
    q, k, v, _, h = drawn(18, heads=2)
    g = (-torch.rand(2, 16)).requires_grad_()
    twice = []
    for inputs, forced in (((q, k, v, g, h), "triton"), (exact((q, k, v, g, h)), "torch")):
        with dispatch.use(forced):
            o, _ = gated(*inputs)
            once = torch.autograd.grad(o.square().sum(), inputs, create_graph=True)
            twice.append((o, *once, *torch.autograd.grad(sum(x.square().sum() for x in once), inputs)))
    assert_near(*twice, steps=1e-4)
    wide = [*exact((q, k, v)), g.detach().double()[None, :, None].expand(q.shape), h.detach().double()]
    assert_near(twice[1][:1], token_by_token(*wide)[:1], 1e-12)


@pytest.mark.parametrize("forced", ["torch", "triton"])
def test_nothing_at_all_gives_nothing_and_keeps_the_state(forced):
    for shape in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)):
        q = torch.randn(shape, requires_grad=True)
        h = torch.randn(*shape[:2], 8, 8, requires_grad=True)
        with dispatch.use(forced):
            o, state = gated(q, q, q, q, h)
            (dh,) = torch.autograd.grad((o.sum(), state.sum()), h)
        assert o.shape == shape
        assert torch.equal(state, h)
        assert torch.equal(dh, torch.ones_like(h))


@pytest.mark.parametrize("route", ["torch", pytest.param("triton", marks=interpreted)])
def test_a_pack_is_its_sequences(route):
    lengths = [5, 0, 1, 9, 1, 0]
    *tensors, _ = drawn(sum(lengths))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    with dispatch.use(route):
        whole = tilebook.gated_linear_attention(*tensors, cu_seqlens=ends)
        parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
        apart = torch.cat([tilebook.gated_linear_attention(*part) for part in parts if part[0].shape[2]], 2)
        above = torch.randn_like(whole)
        grads = [torch.autograd.grad(o, tensors, above) for o in (whole, apart)]
    assert_near((whole, *grads[0]), (apart, *grads[1]), 1e-3 if route == "torch" else 2e-5)
    with pytest.raises(ValueError, match="cu_seqlens goes with neither"):
        tilebook.gated_linear_attention(*tensors, cu_seqlens=ends, return_state=True)


def test_the_dtype_is_that_of_v_and_autocasts_under_autocast():
    tensors = drawn(20)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = gated(*tensors)
        grads = torch.autograd.grad(o.sum(), tensors)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert all(x.dtype == torch.float32 for x in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 8)}, "q and k must have one shape"),
        ({"log_decay": torch.zeros(1, 2, 5, 4)}, r"log_decay of each channel must be fp32 of shape \(1, 2, 5, 8\)"),
        ({"log_decay": torch.zeros(1, 2, 5, 8, device="meta")}, "on one device"),
        ({"log_decay": torch.zeros(3, 8)}, r"log_decay must be fp32 of shape \(1, 2, 5\)"),
        ({"initial_state": torch.zeros(1, 2, 8, 9)}, r"initial_state must be fp32 of shape \(1, 2, 8, 8\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named(change, message):
    arguments = {**dict.fromkeys("qkv", torch.zeros(1, 2, 5, 8)), "log_decay": torch.zeros(1, 2, 5, 8)}
    with pytest.raises(ValueError, match=message):
        tilebook.gated_linear_attention(**arguments | change)


def test_a_step_wants_decays_of_its_channels():
    q, h = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"log_decay must have shape \(1, 2\) or \(2,\) or \(1, 2, 8\)"):
        tilebook.linear_attention_step(q, q, q, h, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="log_decay must have shape"):
        tilebook.gated_delta_rule_step(q, q, q, h, torch.zeros(1, 2, 8), torch.zeros(1, 2))


def test_a_gpu_can_start_as_many_heads_as_there_are():
    """It takes 65,535 programs at most along the second axis of a grid."""
    q = torch.empty(1 << 12, 32, 2048, 8, dtype=torch.bfloat16, device="meta")
    g, state = torch.empty(q.shape, device="meta"), torch.empty(*q.shape[:2], 8, 8, device="meta")
    grids = []
    with devices.posing_as(devices.find("H200")), intercepted(lambda kernel, grid, *_: grids.append(grid)):
        FWD.tunable(q, q, q, g, state, 1.0, config=own(CONFIGS[2], FWD))
        BWD.tunable(q, state, q, q, q, g, state, 1.0, True, config=own(CONFIGS[2], BWD))
    assert len(grids) == 5 + 10
    assert all(each <= 65535 for grid in grids for each in grid[1:])
