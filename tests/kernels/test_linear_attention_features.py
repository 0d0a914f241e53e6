"""Causal linear attention with a feature map in its kernels."""

import pytest
import torch

import tilebook
from tilebook import dispatch, op
from tilebook.kernels import linear_attention as family
from tilebook.kernels.bidirectional.features import NAMED
from tilebook.kernels.bidirectional.form import MAPPED

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
CONFIG = {"CHUNK": 16, "BLOCK_V": 16, "STATE_V": 16, "STATE_WARPS": 4, "num_warps": 1, "num_stages": 1, "WALK": 0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def over_pairs(q, k, v, feature_map, norm, state=None, eps=1e-3):
    """The sum over all pairs of tokens, as one writes it down."""
    q, k = NAMED[feature_map](q), NAMED[feature_map](k)
    a = (q @ k.mT).tril()
    o, weight = a @ v, a.sum(-1, keepdim=True)
    if state is not None:
        old = q @ state.to(q.dtype)
        o, weight = o + old[..., : v.shape[-1]], weight + (old[..., -1:] if norm else 0)
    return o / (weight + eps) if norm else o


def attended(q, k, v, feature_map, norm, state=None, **how):
    return tilebook.linear_attention(
        q, k, v, feature_map=feature_map, causal=True, normalize=norm, initial_state=state, eps=1e-3, **how
    )


def drawn(n, *, heads=2, width=16, columns=16, dtype=torch.float32, state=None, seed=0):
    """q, k, v and, of so many columns more than v, a state that is positive in its last."""
    source = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, n, w, generator=source).to(dtype) for w in (width, width, columns))
    h = [] if state is None else [torch.randn(1, heads, width, columns + state, generator=source)]
    if state:
        h[0][..., -1].abs_()
    return [x.requires_grad_() for x in (q, k, v, *h)]


def gradients(function, tensors, *how):
    o = function(*tensors[:3], *how, *tensors[3:])
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [o, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


def ours(tensors, *how, span=0, **change):
    with dispatch.use("triton", op.Config(CONFIG | {"SPAN": span} | change)):
        o = attended(*tensors[:3], *how, *tensors[3:])
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with dispatch.use("triton", op.Config(CONFIG | change)):
        return [o, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


def exact(tensors, *how):
    return gradients(over_pairs, [x.detach().double().requires_grad_() for x in tensors], *how)


@pytest.mark.sampled(6)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("feature_map", "norm", "state", "span", "width"),
    [
        ("elu+1", True, True, 0, 24),
        ("elu+1", False, False, 1, 16),
        ("relu", True, False, 2, 16),
        ("relu", False, True, 0, 24),
        ("softmax", True, False, 1, 20),
        ("softmax", False, True, 2, 16),
    ],
)
def test_outputs_and_gradients_err_no_more_than_the_quadratic_form(feature_map, norm, state, span, width, dtype):
    sizes = {"heads": 1, "width": width, "columns": 20, "dtype": dtype, "seed": span}
    tensors = drawn(37, state=int(norm) if state else None, **sizes)
    right, plain = exact(tensors, feature_map, norm), gradients(over_pairs, tensors, feature_map, norm)
    found = ours(tensors, feature_map, norm, span=span)
    assert [x.dtype for x in found] == [x.dtype for x in plain]
    step = torch.finfo(dtype).eps
    for mine, theirs, truth in zip(found, plain, right, strict=True):
        for size in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            allowed = 2 * size(theirs.double() - truth) + (4 if dtype == torch.float32 else 1) * step * size(truth)
            assert size(mine.double() - truth) <= allowed


@interpreted
@pytest.mark.parametrize("feature_map", MAPPED)
def test_tokens_that_are_none_count_for_nothing_in_states(feature_map):
    """φ of 0 is 1 or 1 / D, and a chunk has more rows than there are tokens."""
    q, k, v = (x.detach() for x in drawn(21))
    right = NAMED[feature_map](k.double()).mT @ torch.cat((v.double(), torch.ones(1, 2, 21, 1)), -1)
    for change in ({"SPAN": 0}, {"SPAN": 1}, {"SPAN": 0, "CHUNK": 32, "num_warps": 2}):
        with dispatch.use("triton", op.Config(CONFIG | change)):
            _, state = attended(q, k, v, feature_map, True, return_state=True)
        torch.testing.assert_close(state.double(), right, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("feature_map", MAPPED)
def test_a_pack_is_its_sequences(feature_map):
    lengths = [5, 0, 1, 26, 1, 0]
    tensors, ends = drawn(sum(lengths)), torch.tensor([0, *torch.tensor(lengths).cumsum(0)])

    def apart(*tensors):
        parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
        return torch.cat([over_pairs(*part, feature_map, True) for part in parts if part[0].shape[2]], 2)

    right = gradients(lambda *x: apart(*x), [x.detach().double().requires_grad_() for x in tensors])
    with dispatch.use("triton", op.Config(CONFIG | {"SPAN": 0})):
        o = attended(*tensors, feature_map, True, cu_seqlens=ends)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with dispatch.use("triton", op.Config(CONFIG)):
        found = [o, *torch.autograd.grad(o, tensors, do.float())]
    for mine, truth in zip(found, right, strict=True):
        assert (mine.double() - truth).abs().max() <= 2e-5 * truth.abs().max()


@pytest.mark.parametrize("feature_map", MAPPED)
def test_gradients_in_plain_pytorch_are_those_of_differences(feature_map):
    tensors = [x.detach().double().requires_grad_() for x in drawn(5, width=3, columns=2, state=1)]
    with dispatch.use("torch"):
        torch.autograd.gradcheck(lambda q, k, v, h: attended(q, k, v, feature_map, True, h), tensors)


@interpreted
@pytest.mark.parametrize("feature_map", MAPPED)
def test_no_token_sees_what_comes_after_it(feature_map):
    q, k, v = (x.detach() for x in drawn(40))
    later = [torch.cat((x[:, :, :23], 20 * x[:, :, 23:]), 2) for x in (q, k, v)]
    with dispatch.use("triton", op.Config(CONFIG | {"SPAN": 0})):
        before, after = (attended(*x, feature_map, True)[:, :, :23] for x in ((q, k, v), later))
    assert torch.equal(before, after)


@interpreted
@pytest.mark.parametrize("feature_map", MAPPED)
def test_what_is_no_number_is_none_in_what_sees_it(feature_map):
    tensors = drawn(33)
    with torch.no_grad():
        tensors[1][0, 1, 17, 3] = torch.nan
    found = ours(tensors, feature_map, True)
    assert found[0][0, 1, 32].isnan().all()
    assert found[0][0, 0].isfinite().all()
    assert found[2][0, 1, 17, 3].isnan()


@interpreted
def test_nothing_is_kept_for_the_backward_pass_but_what_is_given_and_made():
    q, k, v = drawn(40, dtype=torch.bfloat16)
    kept = []
    with dispatch.use("triton"), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        o = attended(q, k, v, "elu+1", True)
    there = {x.untyped_storage().data_ptr() for x in (q, k, v, o)}
    (divisors,) = [x for x in kept if x.untyped_storage().data_ptr() not in there]
    assert divisors.shape == o.shape[:3]


@interpreted
@pytest.mark.parametrize(("served", "norm"), [("triton", True), ("torch", False)])
def test_it_compiles_to_one_graph_with_its_gradients(served, norm):
    tensors = drawn(20)
    torch._dynamo.reset()
    with dispatch.use(served):
        compiled = torch.compile(lambda *x: attended(*x, "elu+1", norm), backend="aot_eager", fullgraph=True)
        found = gradients(lambda *x: compiled(*x), tensors)
    for mine, truth in zip(found, exact(tensors, "elu+1", norm), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-4)


@interpreted
def test_under_autocast_products_are_narrow_and_gradients_are_wide():
    tensors = drawn(20)
    for served in ("triton", "torch"):
        with dispatch.use(served), torch.autocast("cpu", torch.bfloat16):
            found = gradients(attended, tensors, "softmax", True)
        assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
        for mine, truth in zip(found, exact(tensors, "softmax", True), strict=True):
            assert (mine.double() - truth).abs().max() <= 4e-2 * truth.abs().max()


def test_records_from_before_maps_are_of_problems_without_one():
    for each in family.registered():
        plain = each.problem.parse("B1,H2,S130,D64,normalized", "bf16")
        assert "feature_map" not in plain.key
        assert each.problem.from_key(plain.key) == plain
        mapped = each.problem.parse("B1,H2,S130,D64,normalized,elu+1", "bf16")
        assert mapped.distance(plain) == float("inf")


def test_a_call_like_one_before_is_not_checked_again(monkeypatch):
    q, k, v = (x.detach() for x in drawn(20))
    right, checks = attended(q, k, v, "elu+1", True), []
    monkeypatch.setattr(family.NORMALIZED, "check", lambda *args: checks.append(args))
    monkeypatch.setattr(family, "way", lambda *args, **how: "direct")
    torch.testing.assert_close(attended(q, k, v, "elu+1", True), right)
    assert len(checks) == 1
    monkeypatch.setattr(dispatch, "known", dispatch.lookup)
    torch.testing.assert_close(attended(q, k, v, "elu+1", True), right)
    assert len(checks) == 1
