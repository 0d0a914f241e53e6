import math

import pytest
import torch
import torch.nn.functional as F
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.kernels.bidirectional import features
from tilebook.kernels.linear_attention.pytorch import chunked

FWD, BWD = OPS = [op.get(name) for name in ("linear_attention_fwd", "linear_attention_bwd")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
BASE = {"CHUNK": 16, "BLOCK_V": 16, "STATE_V": 16, "STATE_WARPS": 4, "num_warps": 1, "num_stages": 1}
CONFIGS = [
    *(
        op.Config(BASE | {"SPAN": span, "WALK": walk})
        for span, walk in ((0, 0), (1, 0), (2, 0), (1, 8), (8, 8), (4, 8))
    ),
    op.Config(BASE | {"CHUNK": 64, "SPAN": 1, "WALK": 0}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def backward_of(config):
    return op.Config({axis: value for axis, value in config.items() if axis != "SPAN"})


def quadratic(q, k, v, g=None, state=None, *, scale=1.0, eps=None, wide=torch.float64):
    """The sum over all pairs of tokens, as one writes it down; with eps, divided by the weights."""
    products, (n, columns) = q.dtype, (q.shape[2], v.shape[-1])
    wide = torch.promote_types(wide, torch.float32)
    c = torch.zeros(q.shape[:3], dtype=wide) if g is None else g.to(wide).cumsum(-1)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    a = (q @ k.mT).to(wide) * (c[..., :, None] - c[..., None, :]).masked_fill(~seen, -math.inf).exp()
    o, weight = (a.to(products) @ v).to(wide), a.sum(-1, keepdim=True)
    if state is not None:
        old = (q @ state.to(products)).to(wide) * c.exp()[..., None]
        o, weight = o + old[..., :columns], weight + (old[..., columns:] if eps is not None else 0)
    return (o * scale if eps is None else o / (weight + eps)).to(v.dtype)


def drawn(
    n, *, batch=1, heads=2, width=16, columns=16, dtype=torch.float32, decay=True, state=True, norm=False, seed=0
):
    """q, k, v, log-decays from 1 down to 1e-6, and a state; they want gradients."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=source).to(dtype)

    q, k, v = (normal(batch, heads, n, w, dtype=dtype) for w in (width, width, columns))
    g = -(torch.rand(batch, heads, n, generator=source) ** 4) * 13.8 if decay else None
    h = normal(batch, heads, width, columns + norm) if state else None
    if norm:
        q, k, h = q.abs(), k.abs(), h if h is None else h.abs()
    return [x if x is None else x.requires_grad_() for x in (q, k, v, g, h)]


def gradients(function, tensors, do, **options):
    """The output, and the gradients of all tensors that are there."""
    o = function(*tensors, **options)
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    return [o, *torch.autograd.grad(o, wanted, do.to(o.dtype))]


def exact(tensors):
    return [x if x is None else x.detach().double().requires_grad_() for x in tensors]


def gated(q, k, v, g=None, state=None, **options):
    return tilebook.gated_linear_attention(q, k, v, g, initial_state=state, **options)


def normalized(q, k, v, g=None, state=None, **options):
    return tilebook.linear_attention(q, k, v, feature_map=None, causal=True, initial_state=state, **options)


def error(mine, truth):
    return (mine.double() - truth).abs().max().item(), (mine.double() - truth).square().mean().sqrt().item()


ROUNDED = torch.finfo(torch.float32).eps
"""Terms of about one, rounded in fp32, whose sum may be nothing: so are gradients of q and k of one token alone."""


def assert_as_good(found, plain, truth):
    """Errors of at most twice those of the quadratic form in the same dtype, and some rounding steps."""
    for at, (mine, theirs, right) in enumerate(zip(found, plain, truth, strict=True)):
        # Gradients of decays and states are in fp32, and of products in the dtype of q.
        room = 4 * torch.finfo(mine.dtype).eps if found[0].dtype == torch.float32 else torch.finfo(found[0].dtype).eps
        sizes = right.abs().max().item(), right.square().mean().sqrt().item()
        for its, allowed, size in zip(error(mine, right), error(theirs, right), sizes, strict=True):
            assert its <= 2 * allowed + room * size + ROUNDED, (at, its, allowed, size)


def served(config, call):
    """What a call gives with our kernels in this config, or the default."""
    with dispatch.use("triton", config):
        o = call[0](*call[1], **call[2])
    return o


def ours(function, tensors, do, config=None, **options):
    o = served(config, (function, tensors, options))
    with dispatch.use("triton", config and backward_of(config)):
        return [o, *torch.autograd.grad(o, [x for x in tensors if x is not None and x.requires_grad], do.to(o.dtype))]


@interpreted
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_configs_far_from_the_default_are_feasible_and_right(each):
    from tilebook.tuner.judge.verify import Case, verify

    gpu = devices.find("H200")
    problem = each.problem.parse("B1,H1,S150,D16,V24,decay,initial", "bf16")
    case = Case.make(each, problem, "cpu", 1)
    for config in (CONFIGS[3], CONFIGS[6].replace(BLOCK_V=32)):
        verify(each.tunable, config if each is FWD else backward_of(config), [case], repeats=0)
    assert len(each.tunable.space.feasible(problem, gpu)) > 100


@pytest.mark.parametrize("n", [1, 2, 15, 64, 65, 200])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", [False, True])
def test_by_chunks_in_pytorch_it_is_the_quadratic_form(n, state, decay):
    tensors = exact(drawn(n, decay=decay, state=state))
    do = torch.randn(tensors[2].shape, dtype=torch.float64)
    right = gradients(quadratic, tensors, do, scale=0.3)
    for mine, truth in zip(gradients(gated, tensors, do, scale=0.3), right, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-9)


def test_long_sequences_have_other_chunks_and_the_same_numbers():
    q, k, v, g, _ = (x if x is None else x.detach().double() for x in drawn(5000, batch=1, heads=1, state=False))
    whole = chunked(q, k, v, g, None, 1.0, False, 0.0)
    first = chunked(*(x[:, :, :2500] for x in (q, k, v, g)), None, 1.0, False, 0.0)
    second = chunked(*(x[:, :, 2500:] for x in (q, k, v, g)), first[1], 1.0, False, 0.0)
    torch.testing.assert_close(torch.cat((first[0], second[0]), 2), whole[0])
    torch.testing.assert_close(second[1], whole[1])


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 17, 66])
@pytest.mark.parametrize("how", ["plain", "decay, state", "normalized", "normalized, state"])
def test_outputs_and_gradients_err_no_more_than_the_quadratic_form(how, n, dtype):
    norm = "normalized" in how
    function, options = (normalized, {"eps": 1e-6}) if norm else (gated, {"scale": 0.25})
    tensors = drawn(n, dtype=dtype, decay="decay" in how, state="state" in how, norm=norm, seed=n)
    do = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = gradients(quadratic, exact(tensors), do.double(), **options)
    plain = gradients(quadratic, tensors, do, **options, wide=dtype)
    found = ours(function, tensors, do, **options)
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    if n > 2 or dtype == torch.float32:
        assert_as_good(found, plain, truth)
    else:  # too few numbers for one of two errors to tell anything of the other
        for mine, right in zip(found, truth, strict=True):
            assert error(mine, right)[0] <= 8 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item())


@interpreted
@pytest.mark.parametrize("decay", [1e-6, 1 - 1e-6, 0.0])
def test_constant_decays_are_right(decay):
    g = torch.full((1, 2, 40), decay, dtype=torch.float64).log()
    q, k, v, *_ = drawn(40)
    do = torch.randn(1, 2, 40, 16)
    truth = gradients(quadratic, [*exact((q, k, v)), g.clamp(min=-100)], do.double(), scale=0.25)[:4]
    for heads in (g.float(), g[0, :, 0].float()):
        found = ours(lambda *x, g=heads: gated(*x, g), (q, k, v), do)
        for mine, right in zip(found, truth, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=2e-5)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_are_right(dtype):
    q, k, v, g, _ = drawn(90, state=False, width=32, dtype=dtype)
    with torch.no_grad():
        q.mul_(30 / (q.float() @ k.float().mT).abs().max())
    do = torch.randn(v.shape).to(dtype)
    truth = gradients(quadratic, exact((q, k, v, g)), do.double(), scale=1.0)
    plain = gradients(quadratic, (q, k, v, g), do, scale=1.0, wide=dtype)
    assert_as_good(ours(gated, (q, k, v, g), do, scale=1.0), plain, truth)


@interpreted
def test_sums_beyond_fp16_are_right():
    q, k, v = (torch.full((1, 1, 200, 16), x, dtype=torch.float16) for x in (0.01, 24.0, 30.0))
    with dispatch.use("triton", CONFIGS[1]):
        o, state = gated(q, k, v, return_state=True, scale=1e-3)
        even = tilebook.linear_attention(q, k, v, feature_map=None, causal=True)
    assert state.max() > 1e5
    rows = torch.arange(1, 201, dtype=torch.float64)
    torch.testing.assert_close(o[0, 0, :, 0].double(), rows * 0.01 * 24 * 16 * 30 * 1e-3, rtol=2e-3, atol=0)
    torch.testing.assert_close(even, v)


@interpreted
def test_all_configs_agree_with_each_other_and_with_one_token_after_the_other():
    q, k, v, g, h = (x.detach() for x in drawn(150, heads=1, width=20, columns=16))
    state, rows = h, []
    for t in range(150):
        o, state = tilebook.linear_attention_step(*(x[:, :, t] for x in (q, k, v)), state, g[:, :, t])
        rows.append(o)
    for config in (None, *CONFIGS):
        o, last = served(config, (gated, (q, k, v, g, h), {"return_state": True}))
        torch.testing.assert_close(o, torch.stack(rows, 2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("config", [CONFIGS[3], CONFIGS[2]], ids=["one", "spans"])
def test_a_sequence_in_two_calls_is_the_sequence_with_its_gradients(config):
    tensors = drawn(70)
    do, dstate = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 16, 16)

    def at_once(q, k, v, g, h):
        return gated(q, k, v, g, h, return_state=True)

    def in_two(q, k, v, g, h):
        first, state = at_once(*(x[:, :, :41] for x in (q, k, v, g)), h)
        second, state = at_once(*(x[:, :, 41:] for x in (q, k, v, g)), state)
        return torch.cat((first, second), 2), state

    with dispatch.use("triton", config):
        whole, parts = at_once(*tensors), in_two(*tensors)
    with dispatch.use("triton", config and backward_of(config)):
        grads = [torch.autograd.grad(made, tensors, (do, dstate)) for made in (whole, parts)]
    for mine, other in zip((*parts, *grads[1]), (*whole, *grads[0]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-4)


@interpreted
def test_a_state_that_alone_is_used_has_gradients():
    tensors = drawn(40)
    with dispatch.use("triton"):
        _, last = gated(*tensors, return_state=True)
        found = torch.autograd.grad(last, tensors[1:], torch.ones_like(last))
    _, right = gated(*(wide := exact(tensors)), return_state=True)
    for mine, truth in zip(found, torch.autograd.grad(right, wide[1:], torch.ones_like(right)), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


@interpreted
@settings(max_examples=examples(10), deadline=None)
@given(
    n=st.integers(1, 70), width=st.integers(1, 40), columns=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
    decay=st.booleans(), state=st.booleans(), norm=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_is_right(n, width, columns, dtype, decay, state, norm, seed):
    how = {"width": width, "columns": columns, "dtype": dtype, "state": state, "norm": norm, "seed": seed}
    tensors = drawn(n, heads=1, decay=decay and not norm, **how)
    do = torch.randn(tensors[2].shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    function, options = (normalized, {"eps": 0.1}) if norm else (gated, {"scale": 0.25})
    truth = gradients(quadratic, exact(tensors), do.double(), **options)
    steps = 128 if dtype == torch.float32 else 4
    for mine, right in zip(ours(function, tensors, do, **options), truth, strict=True):
        size = max(right.abs().max().item(), 1.0)
        assert error(mine, right)[0] <= 2 * steps * torch.finfo(dtype).eps * size


@interpreted
def test_tensors_are_taken_as_they_lie():
    tensors = drawn(35)
    do = torch.randn(1, 2, 35, 16)
    right = ours(gated, tensors, do)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors[:4]]
    columns = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors[:3]]
    state = tensors[4].detach().mT.contiguous().mT.requires_grad_()
    for mine, other in zip(ours(gated, (*turned, tensors[4]), do), right, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    for mine, other in zip(ours(gated, (*columns, tensors[3], state), do), right, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert ours(gated, (*turned, tensors[4]), do)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("forced", [False, True])
def test_nothing_at_all_gives_nothing_and_keeps_the_state(forced):
    for shape in ((0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)):
        q = torch.randn(shape, requires_grad=True)
        h = torch.randn(*shape[:2], 8, 8, requires_grad=True)
        with dispatch.use("triton" if forced else "torch"):
            o, state = gated(q, q, q, None, h, return_state=True)
            (dh,) = torch.autograd.grad((o.sum(), state.sum()), h)
            other = normalized(q, q, q)
        assert o.shape == other.shape == shape
        assert torch.equal(state, h)
        assert torch.equal(dh, torch.ones_like(h))


@interpreted
def test_results_repeat_bit_for_bit_and_differentiate_again():
    tensors = drawn(40, batch=1, heads=1)
    do = torch.randn(1, 1, 40, 16)
    for one, other in zip(ours(gated, tensors, do), ours(gated, tensors, do), strict=True):
        assert torch.equal(one, other)
    twice = []
    for inputs, forced in ((tensors, "triton"), (exact(tensors), "torch")):
        with dispatch.use(forced):
            once = torch.autograd.grad(gated(*inputs).square().sum(), inputs, create_graph=True)
            twice.append(torch.autograd.grad(sum(x.square().sum() for x in once), inputs))
    for mine, right in zip(*twice, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=2e-3, atol=2e-3 * right.abs().max().item())


@pytest.mark.parametrize("feature_map", ["elu+1", "relu", "softmax", "performer", torch.exp])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_features_weigh_pairs_of_tokens(feature_map, causal, normalize):
    if causal and feature_map == "performer":
        pytest.skip("its features are of one row each: test_linear_attention_performer.py")
    q, k, v, *_ = exact(drawn(50, columns=8))
    phi = features.mapped(q, k, feature_map)
    a = phi[0] @ phi[1].mT
    a = a.tril() if causal else a
    right = a @ v / (a.sum(-1, keepdim=True) + 1e-3 if normalize else 1)
    o = tilebook.linear_attention(q, k, v, feature_map=feature_map, causal=causal, normalize=normalize, eps=1e-3)
    near = {"rtol": 1e-5, "atol": 1e-6} if feature_map == "performer" else {}  # its exponents are of fp32
    torch.testing.assert_close(o, right, **near)
    if not causal:  # other lengths
        few = tilebook.linear_attention(q[:, :, :7], k, v, feature_map=feature_map, normalize=normalize, eps=1e-3)
        if feature_map != "performer":  # whose queries' features are of one row each
            torch.testing.assert_close(few, right[:, :, :7])


def test_a_state_of_all_tokens_goes_on():
    q, k, v, *_ = exact(drawn(50))
    for norm in (False, True):
        how = {"normalize": norm, "return_state": True}
        whole, state = tilebook.linear_attention(q, k, v, **how)
        _, first = tilebook.linear_attention(q, k[:, :, :20], v[:, :, :20], **how)
        o, last = tilebook.linear_attention(q, k[:, :, 20:], v[:, :, 20:], initial_state=first, **how)
        torch.testing.assert_close(o, whole)
        torch.testing.assert_close(last, state)
        assert state.shape[-1] == 16 + norm


def test_random_features_come_to_exact_attention():
    q, k, v, *_ = (x if x is None else 0.5 * x.detach().double() for x in drawn(30))
    right = F.scaled_dot_product_attention(q, k, v)
    off = []
    for count in (16, 4096):
        phi = features.performer(q, k, features=count)
        o = tilebook.linear_attention(*phi, v, feature_map=None)
        off.append((o - right).abs().max().item())
    assert 4 * off[1] < off[0]
    rows = features.projection(16, 40, 3)
    unit = rows[:16] / rows[:16].norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit @ unit.T, torch.eye(16, dtype=torch.float64))
    assert torch.equal(rows, features.projection(16, 40, 3))


@interpreted
def test_the_dtype_is_that_of_v_and_autocasts_under_autocast():
    tensors = drawn(20)
    with dispatch.use("triton"), torch.autocast("cpu", torch.bfloat16):
        o, state = gated(*tensors, return_state=True)
        grads = torch.autograd.grad(o.sum(), tensors)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert all(x.dtype == torch.float32 for x in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 8)}, "takes tensors of shape"),
        ({"k": torch.zeros(1, 2, 4, 8)}, "q and k must have one shape"),
        ({"v": torch.zeros(1, 2, 4, 8)}, "v the same but for its head dimension"),
        ({"v": torch.zeros(1, 2, 5, 8).half()}, "must have one floating point dtype"),
        ({"log_decay": torch.zeros(1, 2, 4)}, r"log_decay must be fp32 of shape \(1, 2, 5\)"),
        ({"log_decay": torch.zeros(3)}, "log_decay must be fp32"),
        ({"initial_state": torch.zeros(1, 2, 8, 9)}, r"initial_state must be fp32 of shape \(1, 2, 8, 8\)"),
        ({"q": torch.zeros(1, 2, 5, 0), "k": torch.zeros(1, 2, 5, 0)}, "head dimensions must be at least 1"),
        ({"q": 1.0}, "expected a tensor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named(change, message):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 2, 5, 8)) | change
    with pytest.raises(ValueError, match=message):
        tilebook.gated_linear_attention(**arguments)


def test_an_unknown_feature_map_and_a_wrong_step_are_named():
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="feature_map must be 'elu\\+1', 'relu', 'softmax', 'performer', None or a"):
        tilebook.linear_attention(q, q, q, feature_map="gelu")
    with pytest.raises(ValueError, match=r"state \(B, H, D, V\)"):
        tilebook.linear_attention_step(q[:, :, 0], q[:, :, 0], q[:, :, 0], torch.zeros(1, 2, 8, 9))
