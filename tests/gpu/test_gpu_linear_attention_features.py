"""Causal linear attention with a feature map in its kernels, on the GPU that is here."""

import pytest
import torch
from agreeing import assert_rounded_otherwise, feasible_agreeing

import tilebook
from tilebook import dispatch
from tilebook.kernels import linear_attention as family
from tilebook.kernels.bidirectional.features import NAMED
from tilebook.kernels.bidirectional.form import MAPPED

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def over_pairs(q, k, v, feature_map, norm, state=None):
    """The sum over all pairs of tokens, products in the dtype of q, sums in fp32 or fp64."""
    q, k, wide = NAMED[feature_map](q), NAMED[feature_map](k), torch.promote_types(q.dtype, torch.float32)
    a = (q @ k.mT).to(wide).tril()
    o, weight = (a.to(q.dtype) @ v).to(wide), a.sum(-1, keepdim=True)
    if state is not None:
        old = (q @ state.to(q.dtype)).to(wide)
        o, weight = o + old[..., : v.shape[-1]], weight + (old[..., -1:] if norm else 0)
    return (o / (weight + 1e-3) if norm else o).to(v.dtype)


def attended(q, k, v, feature_map, norm, state=None, **how):
    return tilebook.linear_attention(
        q, k, v, feature_map=feature_map, causal=True, normalize=norm, initial_state=state, eps=1e-3, **how
    )


def drawn(n, *, batch=1, heads=2, width=64, columns=64, dtype=torch.bfloat16, state=None):
    source = torch.Generator("cuda").manual_seed(0)
    how = {"device": "cuda", "generator": source}
    q, k, v = (torch.randn(batch, heads, n, w, **how).to(dtype) for w in (width, width, columns))
    h = [] if state is None else [torch.randn(batch, heads, width, columns + state, **how)]
    if state:
        h[0][..., -1].abs_()
    return [x.requires_grad_() for x in (q, k, v, *h)]


def gradients(function, tensors, do, *how):
    o = function(*tensors[:3], *how, *tensors[3:])
    return [o, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


SHAPES = [(3000, 64, 64), (2500, 128, 128), (333, 80, 96), (100, 256, 64)]
FORMS = [(True, None), (True, 1), (False, None), (False, 0)]
CASES = [  # every shape, dtype and map with each other, every form with each of them
    (*shape, *FORMS[(i + j + k) % len(FORMS)], feature_map, dtype)
    for i, shape in enumerate(SHAPES)
    for j, feature_map in enumerate(MAPPED)
    for k, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("n", "width", "columns", "norm", "state", "feature_map", "dtype"), CASES, ids=str)
def test_errors_are_at_most_twice_those_of_the_quadratic_form(n, width, columns, norm, state, feature_map, dtype):
    if dtype == torch.float16 and not norm and n > 1000 and feature_map != "softmax":
        pytest.skip("sums of so many features pass the end of fp16")
    tensors = drawn(n, width=width, columns=columns, dtype=dtype, state=state)
    do = torch.randn_like(tensors[2])
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = gradients(over_pairs, wide, do, feature_map, norm)
    plain = gradients(over_pairs, tensors, do, feature_map, norm)
    with dispatch.use("triton"):
        found = gradients(attended, tensors, do, feature_map, norm)
    steps = 8 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    for at, (mine, theirs, right) in enumerate(zip(found, plain, truth, strict=True)):
        its, other = ((x.double() - right).square().mean().sqrt().item() for x in (mine, theirs))
        assert its <= 2 * other + steps * right.square().mean().sqrt().item() + 1e-9, at


@pytest.mark.parametrize(
    "shape", ["B2,H4,S3000,D128,normalized,elu+1", "B2,H4,S3000,D64,initial,softmax", "B2,H3,S2000,D128,decay,relu"]
)
@pytest.mark.parametrize("name", ["linear_attention_fwd", "linear_attention_bwd"])
def test_feasible_configs_agree(name, shape):
    assert feasible_agreeing(name, shape, "bf16", 16) > 6


@pytest.mark.parametrize("feature_map", MAPPED)
def test_a_pack_is_its_sequences(feature_map):
    lengths = [1000, 0, 1, 2000, 64, 37]
    tensors, ends = drawn(sum(lengths)), torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device="cuda")
    do = torch.randn_like(tensors[2])
    with dispatch.use("triton"):
        whole = attended(*tensors, feature_map, True, cu_seqlens=ends)
        parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
        apart = torch.cat([attended(*part, feature_map, True) for part in parts if part[0].shape[2]], 2)
        found = [(o, *torch.autograd.grad(o, tensors, do)) for o in (whole, apart)]
    for mine, right in zip(*found, strict=True):
        assert_rounded_otherwise(mine, right)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_causal_performer_is_what_it_is_in_fp64_and_sees_nothing_later(scale):
    def performed(q, k, v):
        return tilebook.linear_attention(q, k, v, feature_map="performer", causal=True)

    tensors = drawn(1000, dtype=torch.float32)
    with torch.no_grad():
        tensors[0].mul_(scale), tensors[1].mul_(scale)
    do = torch.randn_like(tensors[2])
    with dispatch.use("triton"):
        found, part = gradients(performed, tensors, do), performed(*(x[:, :, :500] for x in tensors))
    wide = [x.detach().double().cpu().requires_grad_() for x in tensors]
    for mine, right in zip(found, gradients(performed, wide, do.double().cpu()), strict=True):
        assert (mine.double().cpu() - right).abs().max() <= 1e-3 * right.abs().max()
    torch.testing.assert_close(part, found[0][:, :, :500], rtol=1e-3, atol=1e-4)


def test_features_take_no_memory():
    q, k, v = drawn(16384, heads=4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with dispatch.use("triton"):
        o = attended(q, k, v, "elu+1", True)
    made = o.numel() * o.element_size() + 4 * o.shape[:3].numel()
    assert torch.cuda.memory_allocated() - before < made + (1 << 21)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * made + (1 << 22)


def test_results_repeat_bit_for_bit_and_a_call_like_one_before_is_not_checked_again(monkeypatch):
    tensors = drawn(3000, batch=4, heads=8)
    do = torch.randn_like(tensors[2])
    first = gradients(attended, tensors, do, "elu+1", True)
    checks = []
    monkeypatch.setattr(family.NORMALIZED, "check", lambda *args: checks.append(args))
    second = gradients(attended, tensors, do, "elu+1", True)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not checks


def test_compiled_and_eager_are_the_same():
    tensors = drawn(500)

    def both(q, k, v):
        return attended(q, k, v, "elu+1", True), attended(q, k, v, "relu", False)

    for mine, right in zip(torch.compile(both, fullgraph=True)(*tensors), both(*tensors), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=1e-2 * right.float().abs().max().item())
