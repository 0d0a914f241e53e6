"""Attention's implementations that are not ours: eager PyTorch in their own terms stands in for them without a GPU."""

import fake_efficient
import fake_flash
import pytest
import torch
from torch.nn.attention import SDPBackend

import tilebook
from tilebook import device as devices
from tilebook import dispatch, inductor
from tilebook.kernels.attention.form import CAUSAL, PLAIN, form, limits
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.peers import cudnn, efficient, flex, torch_flash
from tilebook.kernels.attention.peers import torch as own
from tilebook.tuner.judge.verify import Case, verify

FORWARD, BACKWARD = attention_fwd.problem, attention_bwd.problem
H200 = devices.find("H200")
BOTH = pytest.mark.parametrize("op", [attention_fwd, attention_bwd], ids=lambda op: op.name)

MORE = (
    "B1,H2,S70,D32,causal,alibi",
    "B1,H4,Hkv2,S40,Sk70,D32,causal,bottom_right,alibi",
    "B1,H2,S70,D32,causal,window30x0,alibi",
    "B1,H2,S1,Sk70,D32,causal,bottom_right",
    "B1,H2,S70,Sk97,D40,causal,bottom_right,softcap",
    "B1,H2,S300,Sk100,D32",
    "B1,H2,S70,Sk90,D32,window5x",
    "B1,H2,S70,Sk90,D32,windowx9",
)


def problems(op, more):
    """The smaller ones of the examples, and more."""
    small = [problem for problem in op.problem.examples() if problem.seq_q * problem.head_dim < 8000]
    return [*small, *(op.problem.parse(text, "bf16") for text in more)]


@pytest.fixture
def flash(monkeypatch):
    """The stand-in where PyTorch's operators would be."""
    monkeypatch.setattr(torch_flash, "_aten", fake_flash.Aten)
    fake_flash.calls.clear()
    return fake_flash


@BOTH
def test_windows_and_groups_reach_flash_attention_as_it_counts_them(flash, op):
    implementation, judged = op.implementations["torch_flash"], 0
    for problem in problems(op, MORE):
        if implementation.supports(problem):
            verify(implementation, None, [Case.make(op, problem, "cpu", 0)])
            judged += 1
    assert judged >= 4  # the plain form is PyTorch's own call of it
    assert flash.calls


CLAIMS = {
    "B1,H2,S100,D64": "mem_efficient cudnn",
    "B2,H8,Hkv2,S40,D32,causal": "mem_efficient cudnn",
    "B1,H2,S100,D72,causal": "mem_efficient cudnn",
    "B1,H2,S100,D160": "mem_efficient",
    "B1,H2,S100,D36": "",
    "B1,H2,S17,Sk70,D64,causal": "mem_efficient",
    "B1,H2,S70,Sk17,D64,causal": "mem_efficient",
    "B1,H2,S70,Sk97,D32,causal,bottom_right": "torch_flash",
    "B1,H2,S97,Sk70,D32,causal,bottom_right": "",
    "B1,H2,S97,D32,causal,window40x0": "torch_flash",
    "B1,H2,S300,Sk100,D32,window250x": "",  # FlashAttention would take the other side for Sk columns
    "B1,H2,S100,D64,softcap": "",
    "B1,H2,S70,D32,causal,alibi": "",
    "B1,H2,S70,D32,biashqk": "mem_efficient cudnn",
    "B1,H2,S70,D32,causal,maskk": "mem_efficient",
    "B1,H2,S70,D32,dropout": "",
}


@BOTH
@pytest.mark.parametrize(("text", "expected"), CLAIMS.items())
def test_each_claims_what_it_can_do_and_no_more(op, text, expected):
    problem = op.problem.parse(text, "bf16")
    names = ["mem_efficient", "torch_flash", "cudnn"]
    assert [name for name in names if op.implementations[name].supports(problem)] == expected.split()


@BOTH
def test_fp32_is_for_the_memory_efficient_kernels(op):
    problem = op.problem.parse("B1,H2,S100,D64", "fp32")
    claims = {name for name, each in op.implementations.items() if each.space is None and each.supports(problem)}
    assert claims == {"torch", "mem_efficient"}


@pytest.fixture
def aten(monkeypatch):
    monkeypatch.setattr(efficient, "_aten", fake_efficient.Aten)


@BOTH
def test_biases_masks_and_log_sum_exps_reach_the_memory_efficient_kernels_as_they_want_them(aten, op):
    implementation, judged = op.implementations["mem_efficient"], 0
    more = ("B2,H4,Hkv2,S33,Sk70,D32,dbiashk", "B1,H2,S40,Sk33,D32,causal,dbiasqk", "B1,H2,S33,D24,causal,maskbqk")
    for problem in problems(op, more):
        if implementation.supports(problem):
            verify(implementation, None, [Case.make(op, problem, "cpu", 0)])
            judged += 1
    assert judged >= 15


@BOTH
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_pytorchs_own_call_is_made_of_the_kernels_that_it_picks(aten, monkeypatch, op, dtype):
    """Not by composing what they give beside the result, the log-sum-exp, once more."""
    monkeypatch.setattr(own, "_backend", lambda *_: SDPBackend.EFFICIENT_ATTENTION)
    monkeypatch.setattr(own.eager, "log_sum_exp", None)
    problem = op.problem.parse("B2,H4,Hkv2,S33,D32,causal", dtype)
    verify(op.implementations["torch"], None, [Case.make(op, problem, "cpu", 0)])


@BOTH
def test_masks_and_biases_reach_cudnn_as_it_wants_them(aten, monkeypatch, op):
    """Numbers in the dtype of q. Of rows that see nothing it tells no log-sum-exp, and wants an infinite one."""

    class Aten(fake_efficient.Aten):
        @staticmethod
        def _scaled_dot_product_cudnn_attention(q, k, v, bias, lse, dropout, causal, debug, *, scale):
            assert bias is None or bias.dtype == q.dtype
            o, lse, *rest = fake_efficient.Aten._scaled_dot_product_efficient_attention(
                q, fake_efficient_heads(k, q), fake_efficient_heads(v, q), bias, lse, dropout, causal, scale=scale
            )
            lse = lse[..., : q.shape[2], None]
            if bias is not None:
                lse = lse.masked_fill(bias.amax(-1, True) == -torch.inf, torch.nan)
            return o, lse, *rest

        @staticmethod
        def _scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse, seed, offset, bias, cum_q, cum_k, n_q, n_k, dropout, causal, *, scale
        ):
            group = q.shape[1] // k.shape[1]
            assert not (lse == -torch.inf).any()
            padded = torch.nn.functional.pad(lse[..., 0], (0, -n_q % 32), value=torch.inf)
            o = o.transpose(1, 2).contiguous().transpose(1, 2)
            dq, dk, dv, _ = fake_efficient.Aten._scaled_dot_product_efficient_attention_backward(
                do, q, fake_efficient_heads(k, q), fake_efficient_heads(v, q), bias, o, padded, seed, seed, 0.0,
                [True, True, True, False], causal, scale=scale,
            )  # fmt: skip
            return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))

    monkeypatch.setattr(cudnn, "_aten", Aten)
    judged = 0
    for problem in problems(op, ("B2,H4,Hkv2,S33,Sk70,D32,biashk", "B1,H2,S33,D24,maskbqk", "B1,H2,S48,D32,maskk")):
        if op.implementations["cudnn"].supports(problem) and problem.form.bias:
            verify(op.implementations["cudnn"], None, [Case.make(op, problem, "cpu", 0)])
            judged += 1
    assert judged >= 3


def fake_efficient_heads(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1).contiguous()


@pytest.mark.parametrize("mask", ["bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_nothing_are_zero_with_any_pair_of_forward_and_backward(aten, mask, causal):
    """Its log-sum-exp of such a row is 0; ours, and what its backward takes for "no weights", are infinite."""
    source = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn((1, 2, 40, 32), generator=source).bfloat16() for _ in range(4))
    shown = torch.rand((1, 1, 40, 40), generator=source) < 0.5
    shown[:, :, 7] = False
    shown[:, :, 3, :5] = False  # and with the causal mask this one
    table = shown if mask == "bool" else torch.where(shown, 0.25, -torch.inf).bfloat16()
    found = []
    for forward in ("torch", "mem_efficient"):
        for backward in ("torch", "mem_efficient"):
            given = [x.clone().requires_grad_() for x in (q, k, v)]
            kind = form(right=0 if causal else -1, bias="mask" if mask == "bool" else "bias")
            o, lse = attention_fwd.implementations[forward](*(x.detach() for x in given), kind, 0.2, table)
            grads = attention_bwd.implementations[backward](do, q, k, v, o, lse, kind, 0.2, table)
            dead = [3, 7] if causal else [7]
            assert (lse[:, :, dead] == -torch.inf).all()
            assert all((x[:, :, dead] == 0).all() for x in (o, grads[0]))
            found.append((o, lse, *grads))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_the_public_function_differentiates_through_it(aten):
    source = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn((2, n, 30, 32), generator=source) for n in (4, 2, 2, 4))
    table = torch.randn((4, 30, 30), generator=source)

    def gradients(implementation, dtype):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        bias = table.to(dtype).requires_grad_()
        with dispatch.use(implementation):
            o = tilebook.attention(*given, causal=True, bias=bias)
        return [o, *torch.autograd.grad(o, [*given, bias], do.to(dtype))]

    for mine, truth in zip(gradients("mem_efficient", torch.float16), gradients("torch", torch.float32), strict=True):
        assert (mine.float() - truth).norm() < 5e-3 * truth.norm()


def test_rows_of_nothing_but_the_most_negative_number_give_it_no_nan(aten):
    q, k, v, do = (torch.randn(1, 1, 20, 32).bfloat16() for _ in range(4))
    table = torch.zeros(1, 1, 20, 20, dtype=torch.bfloat16)
    table[:, :, 5] = torch.finfo(torch.bfloat16).min
    kind = form(bias="bias")
    with dispatch.use("triton"):
        o, lse = tilebook.attention(q, k, v, bias=table, return_lse=True)
    grads = attention_bwd.implementations["mem_efficient"](do, q, k, v, o, lse, kind, 32**-0.5, table)
    assert all(x.isfinite().all() for x in grads)


def test_a_bias_it_would_have_to_round_is_refused(aten):
    q, k, v = (torch.randn(1, 1, 20, 32).bfloat16() for _ in range(3))
    with pytest.raises(TypeError, match="float32"):
        efficient.forward(q, k, v, form(bias="bias"), 0.2, torch.zeros(1, 1, 20, 20))


def test_results_lie_as_queries_do(aten, flash):
    apart = torch.randn(2, 3, 40, 32).bfloat16()
    together = torch.randn(2, 40, 3, 32).bfloat16().transpose(1, 2)
    for name in ("mem_efficient", "torch_flash"):
        for q in (apart, together):
            o, lse = attention_fwd.implementations[name](q, q, q, PLAIN, 0.2)
            assert lse.is_contiguous()
            if name == "mem_efficient":
                assert o.stride() == q.stride()
            for x in attention_bwd.implementations[name](q, q, q, q, o, lse, PLAIN, 0.2):
                assert x.shape == q.shape


@BOTH
def test_pytorch_has_these_operators_with_these_arguments(op):
    """On meta tensors, which go through PyTorch's own checks of shapes and signatures."""
    for problem in op.problem.examples():
        real = problem.inputs("cpu", 0)
        inputs = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in real]
        for name in ("mem_efficient", "torch_flash"):
            if op.implementations[name].supports(problem):
                found = op.implementations[name](*inputs)
                truth = op.implementations["torch"](*real)
                assert [x.shape for x in found] == [x.shape for x in truth]


FLEX = (
    ("B1,H2,S17,D16", "bf16"),
    ("B1,H4,Hkv2,S197,D32,causal", "bf16"),
    ("B1,H1,S100,Sk60,D64,causal,bottom_right", "bf16"),
    ("B1,H2,S100,Sk300,D32,bottom_right,window70x9", "fp16"),
    ("B2,H2,S40,Sk60,D32,causal,softcap,alibi,biash", "bf16"),
    ("B2,H2,S70,D32,maskbq", "bf16"),
)


@pytest.fixture
def traced(monkeypatch):
    """FlexAttention traced and then run by PyTorch's own operators: Inductor has no log-sum-exp for the CPU."""
    monkeypatch.setattr(flex, "LEAST_FLOPS", 0.0)
    monkeypatch.setattr(inductor, "_how", lambda: {"fullgraph": True, "dynamic": False, "backend": "eager"})
    monkeypatch.setattr(flex, "_shapes", type(flex._shapes)())
    flex._compiled.cache_clear()
    yield flex
    flex._compiled.cache_clear()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("text", "dtype"), FLEX)
def test_flex_attention_does_what_the_form_says(traced, text, dtype):
    problem = FORWARD.parse(text, dtype)
    implementation = attention_fwd.implementations["flex_attention"]
    assert implementation.supports(problem)
    verify(implementation, None, [Case.make(attention_fwd, problem, "cpu", 0)])


def test_flex_attention_is_compiled_once_for_each_form_and_shape(traced, monkeypatch):
    seen = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: seen.append(options) or compile_(*args, **options))
    q, longer = torch.randn(1, 1, 20, 16).bfloat16(), torch.randn(1, 1, 21, 16).bfloat16()
    for x in (q, q.clone(), longer, q, longer):
        traced.forward(x, x, x, CAUSAL, 0.25)
    assert len(seen) == 2
    monkeypatch.setattr(traced, "MOST_SHAPES", 2)
    with pytest.raises(RuntimeError, match="2 shapes"):
        traced.forward(longer, q, q, CAUSAL, 0.25)


def test_flex_attention_leaves_no_compiling_processes_behind():
    assert inductor._how()["options"] == {"compile_threads": 1}
    torch.compile(lambda x: x, **inductor._how())  # which looks at the names and types of options


@pytest.mark.parametrize(
    "kind",
    [
        form(right=0),
        form(right=0, bottom_right=True),
        form(left=130, right=0),
        form(left=40, right=200),
        form(left=300),
    ],
    ids=["causal", "bottom_right", "window", "both", "left"],
)
@pytest.mark.parametrize(("n_q", "n_k"), [(256, 256), (300, 700), (700, 300), (40, 500)])
def test_blocks_of_a_band_are_those_of_pytorch(kind, n_q, n_k):
    from torch.nn.attention.flex_attention import create_block_mask

    made = flex.block_mask(kind, n_q, n_k, torch.device("cpu"))
    before, after = limits(kind, n_q, n_k)

    def seen(b, h, i, j):
        inside = j >= i - (n_q + n_k if before is None else before)
        return inside & (j <= i + (n_q + n_k if after is None else after))

    theirs = create_block_mask(seen, None, None, n_q, n_k, device="cpu")
    assert made.shape == theirs.shape
    assert torch.equal(made.to_dense(), theirs.to_dense())
    # A block that reaches past an end is never taken for a full one; others are, wherever PyTorch does.
    assert (made.full_kv_num_blocks <= theirs.full_kv_num_blocks).all()


def test_flex_attention_is_for_calls_that_outlast_the_host_and_for_the_forward_alone():
    assert not flex.supports(FORWARD.parse("B8,H6,S196,D64", "bf16"))
    assert flex.supports(FORWARD.parse("B8,H16,S2048,D128,causal,window512x0", "bf16"))
    assert not flex.supports(FORWARD.parse("B8,H16,S2048,D128,dropout", "bf16"))
    assert not flex.supports(FORWARD.parse("B8,H16,S2048,D128", "fp32"))
    assert "flex_attention" not in attention_bwd.implementations


def test_ours_comes_first_and_those_that_tune_themselves_have_no_space():
    for op in (attention_fwd, attention_bwd):
        assert next(iter(op.implementations.values())) is op.tunable
        names = {"torch", "cudnn", "mem_efficient", "torch_flash"}
        assert all(op.implementations[name].space is None for name in names)
