"""The gated delta rule: by chunks in PyTorch and in the kernels, against one token after the other in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.kernels.delta_rule.pytorch import chunked, gradients
from tilebook.launch import intercepted

FWD, BWD = (op.get(name) for name in ("gated_delta_rule_fwd", "gated_delta_rule_bwd"))
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
BASE = {
    "CHUNK": 16, "BLOCK_V": 16, "PAIR_WARPS": 1, "CHUNK_V": 16, "CHUNK_WARPS": 4, "num_warps": 1, "num_stages": 1,
    "APART": 0, "CHUNK_STAGES": 1,
}  # fmt: skip
CONFIGS = [op.Config(BASE | more) for more in ({}, {"CHUNK": 32, "APART": 1}, {"CHUNK": 64})]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def own(config, each):
    """Those of a config's axes that a direction has."""
    return None if config is None else op.Config({x: n for x, n in config.items() if x in each.tunable.space.axes})


def token_by_token(q, k, v, g, beta, state, *, scale=1.0, normalize=False):
    """(o, state) as the recurrence is written down."""
    if normalize:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    outputs = []
    for t in range(q.shape[2]):
        key = k[:, :, t, :, None]
        state = state if g is None else state * g[:, :, t, None, None].clamp(min=-100).exp()
        state = state + beta[:, :, t, None, None] * key @ (v[:, :, t, None, :] - key.mT @ state)
        outputs.append((q[:, :, t, None, :] @ state)[:, :, 0])
    return torch.stack(outputs, 2) * scale, state


def drawn(n, *, heads=2, width=16, columns=16, dtype=torch.float32, decay=True, state=True, unit=True, seed=0):
    """q, k, v, log-decays from 1 down to 1e-6, β and a state; they want gradients. unit: keys are of length 1."""
    source = torch.Generator().manual_seed(seed)
    q, k, v, h = (
        torch.randn(1, heads, *shape, generator=source)
        for shape in ((n, width), (n, width), (n, columns), (width, columns))
    )
    k = F.normalize(k, dim=-1) if unit else k
    g = -(torch.rand(1, heads, n, generator=source) ** 4) * 13.8 if decay else None
    beta = torch.rand(1, heads, n, generator=source)
    found = *(x.to(dtype) for x in (q, k, v)), g, beta, h if state else None
    return [x if x is None else x.requires_grad_() for x in found]


def exact(tensors):
    return [x if x is None else x.detach().double().requires_grad_() for x in tensors]


def ruled(q, k, v, g, beta, state, *, scale=1.0, normalize=False):
    """(o, state) of the public function."""
    how = {"scale": scale, "normalize_qk": normalize, "return_state": True}
    return tilebook.gated_delta_rule(q, k, v, g, beta, initial_state=state, **how)


def plain(q, k, v, g, beta, state, *, scale=1.0, normalize=False):
    return chunked(q, k, v, g, beta, state, scale, normalize)


def results(function, tensors, *, config=None, dtype=None, **how):
    """o, the state, and the gradients of all tensors that are there. dtype: what the gradient of o is rounded to."""
    with dispatch.use("triton", own(config, FWD)) if function is ruled else dispatch.use("torch"):
        made = function(*tensors, **how)
    above = [torch.sin(0.7 * torch.arange(x.numel(), dtype=torch.float64)).view(x.shape) for x in made]
    above[0] = above[0].to(dtype or made[0].dtype)
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    with dispatch.use("triton", own(config, BWD)) if function is ruled else dispatch.use("torch"):
        grads = torch.autograd.grad(made, wanted, [x.to(y.dtype) for x, y in zip(above, made, strict=True)])
    return [*made, *grads]


def truth(tensors, **how):
    return results(token_by_token, exact(tensors), dtype=tensors[0].dtype, **how)


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_as_good(found, theirs, right):
    """RMS errors of at most twice those of the same chunks in PyTorch's functions, and some rounding steps."""
    steps = torch.finfo(found[0].dtype).eps * (4 if found[0].dtype == torch.float32 else 1)
    for at, (mine, other, exactly) in enumerate(zip(found, theirs, right, strict=True)):
        assert mine.dtype == other.dtype
        assert rms(mine - exactly) <= 2 * rms(other - exactly) + steps * rms(exactly) + 1e-9, at


def assert_near(found, right, steps=2e-5):
    for mine, exactly in zip(found, right, strict=True):
        size = exactly.abs().max().item() if exactly.numel() else 0.0
        torch.testing.assert_close(mine.double(), exactly.double(), rtol=0, atol=steps * size + 1e-7)


@pytest.mark.parametrize("n", [1, 64, 65, 130])
@pytest.mark.parametrize("how", ["", "decay", "decay, state, normalized"])
def test_by_chunks_in_pytorch_it_is_the_recurrence(n, how):
    norm = "normalized" in how
    tensors = exact(drawn(n, columns=12, decay="decay" in how, state="state" in how, unit=not norm))
    how = {"scale": 0.3, "normalize": norm}
    assert_near(results(plain, tensors, **how), truth(tensors, **how), 1e-11)


def test_its_gradients_in_pytorch_are_those_of_differences():
    tensors = exact(drawn(5, heads=1, width=3, columns=2))
    torch.autograd.gradcheck(lambda *x: plain(*x, scale=0.5, normalize=True), tensors)
    do = torch.randn(1, 1, 5, 2, dtype=torch.float64)
    made = gradients(do, None, *tensors, 0.5, True)
    right = torch.autograd.grad(plain(*tensors, scale=0.5, normalize=True)[0], tensors, do)
    assert_near(made, right, 1e-12)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "how"), [(33, "decay, state, normalized"), (20, "")])
def test_outputs_and_gradients_err_no_more_than_the_same_in_pytorch(n, how, dtype):
    norm = "normalized" in how
    tensors = drawn(n, heads=1, dtype=dtype, decay="decay" in how, state="state" in how, unit=not norm, seed=n)
    how = {"scale": 0.25, "normalize": norm}
    assert_as_good(results(ruled, tensors, **how), results(plain, tensors, **how), truth(tensors, **how))


@interpreted
def test_all_configs_agree_with_each_other_and_with_one_token_after_the_other():
    tensors = drawn(66, heads=1, width=20, columns=24, unit=False)
    q, k, v, g, beta, state = (x.detach() for x in tensors)
    rows = []
    for t in range(66):
        row = (x[:, :, t] for x in (q, k, v))
        o, state = tilebook.gated_delta_rule_step(*row, state, g[:, :, t], beta[:, :, t], scale=0.2, normalize_qk=True)
        rows.append(o)
    right = results(plain, tensors, scale=0.2, normalize=True)
    assert_near(right[:2], (torch.stack(rows, 2), state))
    for config in CONFIGS:
        assert_near(results(ruled, tensors, config=config, scale=0.2, normalize=True), right)


@interpreted
def test_widths_between_powers_of_two_are_right_by_slices_that_divide_them():
    tensors = drawn(20, width=192)
    assert_near(results(ruled, tensors, scale=0.1), truth(tensors, scale=0.1))


@pytest.mark.sampled(2)
@interpreted
@pytest.mark.parametrize("decay", [0.0, -30.0, -math.inf])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_constant_decays_and_rates_are_right(decay, beta):
    q, k, v, _, _, h = drawn(40, heads=1)
    g, rate = (torch.full((1, 1, 40), x, requires_grad=True) for x in (decay, beta))
    tensors = q, k, v, g, rate, h
    assert_near(results(ruled, tensors, config=CONFIGS[2]), truth(tensors), 1e-4)


@pytest.mark.parametrize("function", [plain, pytest.param(ruled, marks=interpreted)])
def test_decays_that_are_all_strong_have_gradients_as_small(function):
    tensors = drawn(40, heads=1)
    with torch.no_grad():
        tensors[3].fill_(-13.8)
    found, right = results(function, tensors)[5], truth(tensors)[5]
    assert rms(found - right) <= 1e-4 * rms(right)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_are_all_alike_are_told_apart(dtype):
    """The matrix of each chunk is then as far from its inverse as it can be."""
    q, k, v, _, _, _ = drawn(64, heads=1, dtype=dtype)
    with torch.no_grad():
        k.copy_(k[:, :, :1] + 0.01 * k)
        k.div_(k.norm(dim=-1, keepdim=True))
    tensors = q, k, v, None, torch.ones(1, 1, 64, requires_grad=True), None
    found = results(ruled, tensors, config=CONFIGS[2] if dtype != torch.float32 else None)
    assert_as_good(found, results(plain, tensors), truth(tensors))


@interpreted
def test_a_sequence_in_two_calls_is_the_sequence_with_its_gradients():
    def in_two(*tensors, **how):
        *rows, state = tensors
        first, state = ruled(*(x[:, :, :21] for x in rows), state, **how)
        second, state = ruled(*(x[:, :, 21:] for x in rows), state, **how)
        return torch.cat((first, second), 2), state

    tensors = drawn(40, heads=1)
    with dispatch.use("triton"):
        parts = in_two(*tensors)
        above = [torch.randn_like(x) for x in parts]
        grads = torch.autograd.grad(parts, tensors, above)
        whole = ruled(*tensors)
        assert_near((*parts, *grads), (*whole, *torch.autograd.grad(whole, tensors, above)))


@interpreted
def test_a_state_that_alone_is_used_has_gradients():
    tensors = drawn(40, heads=1)
    with dispatch.use("triton"):
        last = ruled(*tensors)[1]
        found = torch.autograd.grad(last, tensors[1:], torch.ones_like(last))
    wide = exact(tensors)
    last = plain(*wide)[1]
    assert_near(found, torch.autograd.grad(last, wide[1:], torch.ones_like(last)))


@interpreted
def test_tensors_are_taken_as_they_lie():
    tensors = drawn(18, heads=1)
    right = results(ruled, tensors)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors[:5]]
    columns = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors[:3]]
    state = tensors[5].detach().mT.contiguous().mT.requires_grad_()
    for lying in ((*turned, tensors[5]), (*columns, *tensors[3:5], state)):
        for mine, other in zip(results(ruled, lying), right, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


@interpreted
def test_results_repeat_bit_for_bit_and_differentiate_again():
    tensors = drawn(20, heads=1)
    for one, other in zip(results(ruled, tensors), results(ruled, tensors), strict=True):
        assert torch.equal(one, other)
    twice = []
    for inputs, forced in ((tensors, "triton"), (exact(tensors), "torch")):
        with dispatch.use(forced):
            once = torch.autograd.grad(ruled(*inputs)[0].square().sum(), inputs, create_graph=True)
            twice.append(torch.autograd.grad(sum(x.square().sum() for x in once), inputs))
    assert_near(*twice, steps=1e-3)


@pytest.mark.parametrize("forced", ["torch", "triton"])
def test_nothing_at_all_gives_nothing_and_keeps_the_state(forced):
    for shape in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)):
        q = torch.randn(shape, requires_grad=True)
        h = torch.randn(*shape[:2], 8, 8, requires_grad=True)
        with dispatch.use(forced):
            o, state = ruled(q, q, q, q[..., 0], q[..., 0], h)
            (dh,) = torch.autograd.grad((o.sum(), state.sum()), h)
        assert o.shape == shape
        assert torch.equal(state, h)
        assert torch.equal(dh, torch.ones_like(h))


@pytest.mark.parametrize("route", ["torch", pytest.param("triton", marks=interpreted)])
def test_a_pack_is_its_sequences(route):
    lengths = [5, 0, 1, 20, 1, 0]
    *tensors, _ = drawn(sum(lengths), heads=1)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    with dispatch.use(route):
        whole = tilebook.gated_delta_rule(*tensors, cu_seqlens=ends)
        parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
        apart = torch.cat([tilebook.gated_delta_rule(*part) for part in parts if part[0].shape[2]], 2)
        above = torch.randn_like(whole)
        grads = [torch.autograd.grad(o, tensors, above) for o in (whole, apart)]
    assert_near((whole, *grads[0]), (apart, *grads[1]), 5e-4)
    with pytest.raises(ValueError, match="cu_seqlens goes with neither"):
        tilebook.gated_delta_rule(*tensors, cu_seqlens=ends, return_state=True)


def test_heads_of_keys_serve_several_of_values():
    q, k, v, g, beta, h = drawn(20, heads=4)
    few = [x[:, :2] for x in (q, k)]
    right = ruled(*(x.repeat_interleave(2, 1) for x in few), v, g, beta, h)
    assert_near(ruled(*few, v, g, beta, h), right, 0)
    rows = (x[:, :, 0] for x in (*few, v))
    o, state = tilebook.gated_delta_rule_step(*rows, h, g[:, :, 0], beta[:, :, 0], scale=1.0)
    assert_near((o, state), (right[0][:, :, 0], state), 1e-6)
    with pytest.raises(ValueError, match="4 heads of v are not a multiple of 3"):
        ruled(q[:, :3], k[:, :3], v, g, beta, h)


def test_the_dtype_is_that_of_v_and_autocasts_under_autocast():
    tensors = drawn(20)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = ruled(*tensors)
        grads = torch.autograd.grad(o.sum(), tensors)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert all(x.dtype == torch.float32 for x in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, "takes tensors of shape"),
        ({"k": torch.zeros(1, 2, 4, 8)}, "q and k must have one shape"),
        ({"v": torch.zeros(1, 2, 5, 8).half()}, "must have one floating point dtype"),
        ({"log_decay": torch.zeros(1, 2, 4)}, r"log_decay must be fp32 of shape \(1, 2, 5\)"),
        ({"beta": torch.zeros(1, 2, 4)}, r"beta must be fp32 of shape \(1, 2, 5\)"),
        ({"beta": None}, "expected a tensor, not NoneType"),
        ({"initial_state": torch.zeros(1, 2, 8, 9)}, r"initial_state must be fp32 of shape \(1, 2, 8, 8\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named(change, message):
    arguments = {**dict.fromkeys("qkv", torch.zeros(1, 2, 5, 8)), "log_decay": None, "beta": torch.zeros(1, 2, 5)}
    with pytest.raises(ValueError, match=message):
        tilebook.gated_delta_rule(**arguments | change)


def test_a_wrong_step_and_a_scale_to_be_learnt_are_named():
    q, beta = torch.zeros(1, 2, 8), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"state \(B, H, D, V\)"):
        tilebook.gated_delta_rule_step(q, q, q, torch.zeros(1, 2, 8, 9), None, beta)
    with pytest.raises(ValueError, match="beta must be floating point of shape"):
        tilebook.gated_delta_rule_step(q, q, q, torch.zeros(1, 2, 8, 8), None, beta.int())
    with pytest.raises(TypeError, match="scale must be a number"):
        tilebook.gated_delta_rule(*[q[None]] * 3, None, beta[None], scale=torch.ones((), requires_grad=True))


def test_a_gpu_can_start_as_many_heads_as_there_are():
    """It takes 65,535 programs at most along the second axis of a grid."""
    q = torch.empty(1 << 12, 32, 2048, 8, dtype=torch.bfloat16, device="meta")
    g, state = torch.empty(q.shape[:3], device="meta"), torch.empty(*q.shape[:2], 8, 8, device="meta")
    grids = []
    with devices.posing_as(devices.find("H200")), intercepted(lambda kernel, grid, *_: grids.append(grid)):
        config = CONFIGS[1].replace(CHUNK=16)
        FWD.tunable(q, q, q, g, g, state, 1.0, True, config=own(config, FWD))
        BWD.tunable(q, state, q, q, q, g, g, state, 1.0, True, config=own(config, BWD))
    assert len(grids) == 8
    assert all(grid[1:] in ((), (128,)) for grid in grids)
