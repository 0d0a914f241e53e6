"""Attention's implementations on the GPU together: any forward's log-sum-exp feeds any backward, features included."""

import dataclasses

import pytest
import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.kernels.attention.form import form
from tilebook.kernels.attention.peers import flash4, flex
from tilebook.kernels.attention.pytorch import sdpa
from tilebook.tuner.judge.verify import Case, Wrong, verify

pytestmark = pytest.mark.gpu

SDPA = torch.nn.functional.scaled_dot_product_attention
FORWARD, BACKWARD = ops.get("attention_fwd"), ops.get("attention_bwd")

PAIRED = (
    ("B2,H4,S197,D64", "bf16"),
    ("B1,H4,Hkv2,S333,D128,causal", "bf16"),
    ("B1,H4,Hkv1,S100,Sk260,D64", "fp16"),
    ("B1,H2,S197,Sk333,D64,causal,bottom_right", "bf16"),
    ("B1,H2,S333,D64,causal,window100x0", "bf16"),
    ("B2,H2,S197,D72,dbiashqk", "bf16"),
    ("B2,H4,Hkv2,S100,Sk197,D64,causal,dbiasbhqk", "bf16"),
    ("B2,H2,S197,Sk100,D64,maskbqk", "bf16"),
    ("B1,H2,S197,D64,causal", "fp32"),
)


@pytest.fixture(autouse=True)
def _short_calls_count(monkeypatch):
    monkeypatch.setattr(flash4, "LEAST_FLOPS", 0.0)
    monkeypatch.setattr(flex, "LEAST_FLOPS", 0.0)


def running(op, problem):
    """(implementation, config) of all that can run the problem here, tunable ones with their default."""
    gpu = devices.current()
    for each in op.implementations.values():
        if each.can_run(problem, gpu):
            yield each, None if each.space is None else each.space.default(problem, gpu)


@pytest.mark.parametrize(("text", "dtype"), PAIRED, ids=lambda value: value)
def test_any_forward_feeds_any_backward(text, dtype):
    problem = BACKWARD.problem.parse(text, dtype)
    case = Case.make(BACKWARD, problem, "cuda", 0)
    do, q, k, v, _, _, kind, scale, *extras = case.inputs
    wrong = []
    for forward, config in running(FORWARD, FORWARD.problem.parse(text.replace("dbias", "bias"), dtype)):
        o, lse = forward(q, k, v, kind, scale, *extras, config=config)
        assert o.shape == q.shape
        assert lse.shape == q.shape[:3]
        fed = dataclasses.replace(case, inputs=(do, q, k, v, o, lse, kind, scale, *extras))
        for backward, settings in running(BACKWARD, problem):
            try:
                verify(backward, settings, [fed])
            except Wrong as found:
                wrong.append(f"{forward.name} → {backward.name}: {found}")
    assert not wrong, "\n".join(wrong)


FLEX = (
    ("B1,H2,S197,D64", "bf16"),
    ("B1,H4,Hkv2,S333,D128,causal", "bf16"),
    ("B1,H2,S100,Sk333,D64,causal,bottom_right", "bf16"),
    ("B1,H2,S333,Sk100,D64,causal,bottom_right", "bf16"),
    ("B1,H2,S1000,D64,causal,window300x0", "fp16"),
    ("B1,H2,S100,D64,softcap", "bf16"),
    ("B2,H3,S70,Sk100,D32,alibi", "bf16"),
    ("B2,H4,Hkv2,S140,Sk200,D32,causal,biasbhqk", "bf16"),
    ("B2,H2,S170,D32,maskbk", "bf16"),
    ("B1,H2,S200,D72,causal,window50x0,softcap,biasq,alibi", "bf16"),
)


@pytest.mark.parametrize(("text", "dtype"), FLEX, ids=lambda value: value)
def test_flex_attention_is_right_where_inductor_compiles_it(text, dtype):
    problem = FORWARD.problem.parse(text, dtype)
    implementation = FORWARD.implementations["flex_attention"]
    assert implementation.can_run(problem, devices.current())
    verify(implementation, None, [Case.make(FORWARD, problem, "cuda", 0)])


def test_flex_attention_leaves_no_process_behind():
    """The tuner takes a process that a candidate leaves behind for a fault."""
    from tilebook.tuner.process.processes import children

    before = set(children())
    q = torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16)
    FORWARD.implementations["flex_attention"](q, q, q, form(left=77, right=0), 0.125)
    assert set(children()) <= before


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_rows_that_see_nothing_are_zero_everywhere(kind, causal):
    """Also where an infinite bias hides them, which the problems' random biases never do."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = (
        torch.randn(2, 2, 197, 64, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)
    )
    shown = torch.rand(1, 1, 197, 197, device="cuda", generator=generator) < 0.5
    shown[:, :, 70] = False
    shown[:, :, 5, :10] = False  # under a causal mask this one sees nothing either
    table = shown if kind == "mask" else torch.where(shown, 0.25, -torch.inf).bfloat16()
    suffix = ",causal" if causal else ""
    problem = BACKWARD.problem.parse(f"B2,H2,S197,D64{suffix},{kind}qk", "bf16")
    options = form(right=0 if causal else -1, bias=kind)
    seen = shown[0, 0].tril() if causal else shown[0, 0]
    dead = (~seen.any(1)).nonzero().flatten().tolist()  # chance may hide what little the first rows see, too
    assert 70 in dead
    assert (5 in dead) == causal
    for forward, config in running(FORWARD, FORWARD.problem.parse(problem.label, "bf16")):
        o, lse = forward(q, k, v, options, 0.125, table, config=config)
        assert (o[:, :, dead] == 0).all(), forward.name
        assert (lse[:, :, dead] == -torch.inf).all(), forward.name
        assert lse.isfinite().sum() == lse.numel() - 4 * len(dead), forward.name
        for backward, settings in running(BACKWARD, problem):
            dq, dk, dv = backward(do, q, k, v, o, lse, options, 0.125, table, config=settings)
            assert (dq[:, :, dead] == 0).all(), (forward.name, backward.name)
            assert all(x.isfinite().all() for x in (dq, dk, dv)), (forward.name, backward.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length", [192, 200])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("rows", [1, None], ids=["keys", "pairs"])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_rows_that_see_nothing_are_zero_where_pytorch_serves(kind, rows, learnt, length, dtype):
    if kind == "mask" and learnt:
        pytest.skip("booleans have no gradient")
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [
        torch.randn(2, 2, length, 64, device="cuda", dtype=dtype, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    shown = torch.rand(2, 1, rows or length, length, device="cuda", generator=generator) < 0.5
    shown[1, :, -1] = False  # of keys: all that this sequence has
    table = shown if kind == "mask" else torch.where(shown, 0.25, -torch.inf).to(dtype).requires_grad_(learnt)
    o = sdpa(*leaves, False, None, table)
    assert (o[1, :, -1] == 0).all()
    wanted = [*leaves, table] if learnt else leaves
    found = torch.autograd.grad(o.float().square().sum(), wanted)
    assert all(each.isfinite().all() for each in found)
    assert (found[0][1, :, -1] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["cudnn", "torch"])
def test_gradients_are_right_whatever_graph_of_cudnn_served_such_tensors_before(name, causal):
    """PyTorch up to 2.11 repeats cuDNN's graph for gradients that lie otherwise than those it was made for."""
    shape, kind = (2, 4, 160, 64), form(right=0 if causal else -1)

    def laid(how, x):
        if how == "rows":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        wide = torch.empty((*x.shape[:3], 2 * x.shape[3]), device="cuda", dtype=x.dtype)
        return x.contiguous() if how == "heads" else wide[..., : x.shape[3]].copy_(x)

    do, q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    right = torch.autograd.grad(SDPA(*leaves, is_causal=causal), leaves, do.double())
    forward, backward = FORWARD.implementations[name], BACKWARD.implementations[name]
    for layout in ("heads", "rows", "wide"):
        given = [laid(layout, x) for x in (q, k, v)]
        for before in ("heads", "rows", "wide"):
            leaves = [x.detach().requires_grad_() for x in given]
            torch.autograd.grad(SDPA(*leaves, is_causal=causal), leaves, laid(before, do))
            o, lse = forward(*given, kind, 0.125)
            for which in ("heads", "rows", "wide"):
                found = backward(laid(which, do), *given, laid(before, o), lse, kind, 0.125)
                for got, wanted in zip(found, right, strict=True):
                    torch.testing.assert_close(got.double(), wanted, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("text", ["B2,H4,S256,D64,maskbk", "B2,H4,S256,D64,biashqk", "B2,H4,S256,D64,causal,biashqk"])
def test_pytorchs_own_is_timed_as_a_program_calls_it(text):
    def kernels(call):
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        return sorted(each.key for each in profile.key_averages() if each.device_time_total)

    problem = FORWARD.problem.parse(text, "bf16")
    q, k, v, its, scale, bias = problem.inputs("cuda", 0)
    own, mask = FORWARD.implementations["torch"], bias
    if its.causal:
        mask = bias.masked_fill(torch.ones(256, 256, dtype=torch.bool, device="cuda").triu(1), -torch.inf)
    o, _ = own(q, k, v, its, scale, bias)
    torch.testing.assert_close(own.to_time(q, k, v, its, scale, bias)[0], o, rtol=0, atol=0)
    with torch.no_grad():
        theirs = kernels(lambda: SDPA(q, k, v, mask.expand(2, 4, 256, 256), scale=scale))
    ours = kernels(lambda: own.to_time(q, k, v, its, scale, bias))
    attention = [name for name in theirs if "sdpa" in name or "fmha" in name or "attention" in name]
    assert set(attention) <= set(ours)
    assert not any("reduce" in name for name in ours), "nobody looks for rows that see nothing"
