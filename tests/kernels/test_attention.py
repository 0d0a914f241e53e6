"""Attention beyond what holds for every family: other configs, strides, autograd, the public function and its errors.

Without a GPU kernels run in Triton's interpreter. The rule is `Case.judge`'s: at most twice the error that PyTorch
makes in the same dtype against the fp32 truth, in maximum and RMS, plus half a rounding step of the largest value.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.kernels.attention import eager
from tilebook.kernels.attention.form import CAUSAL, PLAIN
from tilebook.kernels.attention.ops import attention_bwd, attention_fwd
from tilebook.kernels.attention.pytorch import sdpa
from tilebook.kernels.attention.triton.tiles import rounded
from tilebook.launch import intercepted
from tilebook.op import UsageError
from tilebook.tuner.judge.verify import Case, truths, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")
FORWARD, BACKWARD = attention_fwd.problem, attention_bwd.problem

FORWARD_CONFIGS = {
    "pointers": {"DESCRIPTORS": 0},
    "wide columns": {"BLOCK_N": 128, "num_warps": 4, "DESCRIPTORS": 1},
    "narrow columns, turns of 4": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "HEADS": 4},
}
BACKWARD_CONFIGS = {
    "pointers": {"DESCRIPTORS": 0},
    "small against large, turns of 4": {"BLOCK_M1": 32, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 32, "HEADS": 4},
    "large against small": {"BLOCK_M1": 128, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 128, "DESCRIPTORS": 1},
}
RAGGED = ("B1,H2,S197,D64,causal", "B1,H1,S100,Sk197,D64,causal", "B1,H1,S197,Sk100,D32,causal", "B1,H6,Hkv2,S70,D32")


def _tensors(*shapes, dtype=torch.bfloat16, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(DEVICE, dtype) for shape in shapes]


def _relative(x, truth):
    return ((x.float() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("text", RAGGED)
@pytest.mark.parametrize("axes", FORWARD_CONFIGS.values(), ids=FORWARD_CONFIGS)
def test_forward_is_right_with_other_configs(axes, text):
    problem = FORWARD.parse(text, "bf16")
    config = attention_fwd.tunable.space.default(problem, H200).replace(**axes)
    verify(attention_fwd.tunable, config, [Case.make(attention_fwd, problem, DEVICE, 1)], repeats=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("text", RAGGED)
@pytest.mark.parametrize("axes", BACKWARD_CONFIGS.values(), ids=BACKWARD_CONFIGS)
def test_backward_is_right_with_other_configs(axes, text):
    problem = BACKWARD.parse(text, "bf16")
    config = attention_bwd.tunable.space.default(problem, H200).replace(**axes)
    verify(attention_bwd.tunable, config, [Case.make(attention_bwd, problem, DEVICE, 1)], repeats=0)


def _far(x):
    """The same numbers, its second batch entry more than 2³¹ elements behind the first."""
    step = (1 << 31) + 64
    far = torch.empty(step + x[0].numel(), dtype=x.dtype, device=x.device).as_strided(x.shape, (step, *x.stride()[1:]))
    return far.copy_(x)


@pytest.mark.parametrize("descriptors", [0, 1])
def test_offsets_may_need_more_than_32_bits(descriptors):
    do, q, k, v = _tensors(*[(2, 2, 40, 16)] * 4)
    config = attention_fwd.tunable.space.default(FORWARD.of(q, k, v, CAUSAL, 0.2), H200).replace(
        DESCRIPTORS=descriptors
    )
    far = [_far(x) for x in (q, k, v)]
    o, lse = attention_fwd.tunable(q, k, v, CAUSAL, 0.2, config=config)
    for got, right in zip(attention_fwd.tunable(*far, CAUSAL, 0.2, config=config), (o, lse), strict=True):
        assert torch.equal(got, right)
    args = do, q, k, v, o, lse
    config = attention_bwd.tunable.space.default(BACKWARD.of(*args, CAUSAL, 0.2), H200).replace(DESCRIPTORS=descriptors)
    right = attention_bwd.tunable(*args, CAUSAL, 0.2, config=config)
    for got, each in zip(
        attention_bwd.tunable(_far(do), *far, _far(args[4]), lse, CAUSAL, 0.2, config=config), right, strict=True
    ):
        assert torch.equal(got, each)


@triton.jit
def _round_all(x, out, TF32: tl.constexpr):
    at = tl.arange(0, 8)
    tl.store(out + at, rounded(tl.load(x + at), TF32))


def test_factors_are_rounded_to_the_nearest_tf32():
    """Of 23 bits after the point 10 are left; halves away from zero; NaN and infinity stay."""
    step = 2.0**-10
    x = torch.tensor(
        [1 + step, 1 + 0.49 * step, -1 - 0.5 * step, 1 + 0.51 * step, 0.0, torch.inf, -torch.inf, torch.nan]
    )
    out, right = (
        torch.empty(8, device=DEVICE),
        [1 + step, 1.0, -1 - step, 1 + step, 0.0, torch.inf, -torch.inf, torch.nan],
    )
    _round_all[(1,)](x.to(DEVICE), out, True)
    torch.testing.assert_close(out.cpu(), torch.tensor(right), rtol=0, atol=0, equal_nan=True)
    _round_all[(1,)](x.to(DEVICE), out, False)
    torch.testing.assert_close(out.cpu(), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [4, 7, 8])
def test_backward_with_dropout_forgives_what_was_rounded_in_rows_of_one_weight(seed):
    problem = BACKWARD.parse("B1,H2,S100,D32,dropout", "bf16")
    config = attention_bwd.tunable.space.default(problem, H200)
    case = Case.make(attention_bwd, problem, DEVICE, seed, numbers="outliers")
    verify(attention_bwd.tunable, config, [case], repeats=0)


@pytest.mark.parametrize("descriptors", [0, 1])
def test_any_strides_will_do(descriptors):
    """Slices of one (B, S, 3, H, D) projection, and a gradient expanded from a scalar."""
    (qkv,) = _tensors((2, 70, 3, 2, 32))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    (do,) = _tensors((1, 2, 1, 32), seed=1)
    do = do.expand(2, 2, 70, 32)
    o, lse = attention_fwd.implementations["torch"](q, k, v, CAUSAL, 0.2)
    for op, inputs in ((attention_fwd, (q, k, v, CAUSAL, 0.2)), (attention_bwd, (do, q, k, v, o, lse, CAUSAL, 0.2))):
        config = op.tunable.space.default(op.problem.of(*inputs), H200).replace(DESCRIPTORS=descriptors)
        outputs = op.tunable(*inputs, config=config)
        for output, truth in zip(outputs, truths(op, inputs), strict=True):
            assert _relative(output, truth) < 5e-3
        assert outputs[0].transpose(1, 2).is_contiguous()  # as q lies in memory, so that no copy follows


def test_numbers_beyond_the_ends_of_tensors_do_not_leak():
    """Infinite and NaN rows directly after every sequence, as in a padded batch."""
    tensors = _tensors(*[(1, 2, 90, 32)] * 4)
    for x in tensors:
        x[:, :, 50:60], x[:, :, 60:] = torch.nan, torch.inf
    q, k, v, do = (x[:, :, :50] for x in tensors)
    o, lse = attention_fwd.implementations["torch"](q, k, v, PLAIN, 0.2)
    for op, inputs in ((attention_fwd, (q, k, v, PLAIN, 0.2)), (attention_bwd, (do, q, k, v, o, lse, PLAIN, 0.2))):
        for descriptors in (0, 1):
            config = op.tunable.space.default(op.problem.of(*inputs), H200).replace(DESCRIPTORS=descriptors)
            for output, truth in zip(op.tunable(*inputs, config=config), truths(op, inputs), strict=True):
                assert _relative(output, truth) < 5e-3


def test_very_negative_log_sum_exp_does_not_poison_gradients():
    """exp(0 - lse) overflows for the columns past the end of a ragged sequence, where scores are 0."""
    q, k, v, do = _tensors(*[(1, 1, 40, 32)] * 4)
    q, k = q.abs() * 16, -k.abs() * 16
    o, lse = attention_fwd.implementations["torch"](q, k, v, PLAIN, 0.2)
    assert lse.max() < -150
    inputs = do, q, k, v, o, lse, PLAIN, 0.2
    for output in attention_bwd.tunable(
        *inputs, config=attention_bwd.tunable.space.default(BACKWARD.of(*inputs), H200)
    ):
        assert output.isfinite().all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("heads", "heads_kv", "seq_q", "seq_k"), [(2, 2, 33, 33), (4, 2, 20, 45), (4, 1, 45, 20)])
def test_reference_is_what_autograd_says(heads, heads_kv, seq_q, seq_k, causal, monkeypatch):
    monkeypatch.setattr(eager, "_PIECE", 200)  # many pieces, with a ragged last one
    shapes = (2, heads, seq_q, 16), (2, heads_kv, seq_k, 16), (2, heads_kv, seq_k, 16), (2, heads, seq_q, 16)
    q, k, v, do = (x.requires_grad_() for x in _tensors(*shapes, dtype=torch.float64))
    scores = 0.3 * q @ k.repeat_interleave(heads // heads_kv, 1).mT
    if causal:
        scores = scores.masked_fill(torch.ones(seq_q, seq_k, device=DEVICE).tril() == 0, -torch.inf)
    o = scores.softmax(-1) @ v.repeat_interleave(heads // heads_kv, 1)
    expected = torch.autograd.grad(o, (q, k, v), do)
    plain = [x.detach().float() for x in (q, k, v, do)]
    form = CAUSAL if causal else PLAIN
    ours, lse = eager.forward(*plain[:3], form, 0.3)
    torch.testing.assert_close(ours, o.float())
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())
    torch.testing.assert_close(lse, eager.log_sum_exp(*plain[:2], form, 0.3))
    for mine, theirs in zip(eager.backward(plain[3], *plain[:3], form, 0.3), expected, strict=True):
        torch.testing.assert_close(mine, theirs.float())


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU our kernels serve this call")
@pytest.mark.parametrize("heads_kv", [4, 2], ids=["equal heads", "grouped"])
def test_on_the_cpu_it_is_pytorch_bit_for_bit(heads_kv):
    ours = [x.requires_grad_() for x in _tensors((2, 4, 30, 24), *[(2, heads_kv, 30, 24)] * 2)]
    theirs = [x.detach().requires_grad_() for x in ours]
    o = tilebook.attention(*ours, causal=True)
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=heads_kv != 4)
    assert torch.equal(o, expected)
    o.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients_through_the_public_function(causal):
    shapes = (2, 4, 70, 32), (2, 2, 50, 32), (2, 2, 50, 32)
    ours = [x.requires_grad_() for x in _tensors(*shapes)]
    exact = [x.detach().float().requires_grad_() for x in ours]
    with dispatch.use("triton"):
        o = tilebook.attention(*ours, causal=causal, scale=0.3)
        o.float().sum().backward()  # do is expanded from a scalar
    truth = sdpa(*exact, causal, 0.3)
    truth.sum().backward()
    assert o.dtype == torch.bfloat16
    assert _relative(o, truth) < 5e-3
    # dq and dk are differences of nearly equal sums here, so they are held to the size of dv's error.
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.grad.float() - right.grad).abs().max() < 0.03


def test_without_gradients_no_graph_is_built_and_the_values_are_the_same():
    q, k, v = _tensors(*[(1, 2, 40, 32)] * 3)
    with dispatch.use("triton"):
        plain = tilebook.attention(q, k, v)
        graph = tilebook.attention(q.requires_grad_(), k, v)
        with torch.no_grad():
            none = tilebook.attention(q, k, v)
    assert not plain.requires_grad
    assert not none.requires_grad
    assert torch.equal(plain, graph)


def test_autocast_casts_as_pytorch_does():
    q, k, v = _tensors(*[(1, 2, 40, 32)] * 3, dtype=torch.float32)
    with dispatch.use("triton"), torch.autocast(DEVICE, torch.bfloat16):
        o = tilebook.attention(q, k.bfloat16(), v.requires_grad_())
        o.sum().backward()
    assert o.dtype == torch.bfloat16
    assert v.grad.dtype == torch.float32
    assert _relative(o, F.scaled_dot_product_attention(q, k, v)) < 1e-2


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(0, 2, 8, 32)] * 3, {}),
        ([(1, 2, 0, 32)] + [(1, 2, 8, 32)] * 2, {}),
        ([(1, 2, 8, 20)] * 3, {}),
        ([(1, 2, 8, 32)] * 3, {"scale": -0.5}),
        ([(1, 2, 8, 32)] * 3, {"scale": 0.0}),
    ],
    ids=["no batch", "no rows", "odd head dimension", "negative scale", "zero scale"],
)
def test_what_our_kernels_do_not_serve_goes_to_pytorch(shapes, options):
    q, k, v = _tensors(*shapes)
    with sdpa_kernel(SDPBackend.MATH):  # others make NaN of scales that are not positive
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    with dispatch.use("triton"):
        torch.testing.assert_close(tilebook.attention(q, k, v, causal=True, **options), expected, atol=5e-3, rtol=2e-2)


GOOD = (1, 4, 8, 32)


@pytest.mark.parametrize(
    ("q", "k", "v", "text"),
    [
        (GOOD[1:], GOOD, GOOD, "shape .batch, heads, sequence, head dimension."),
        (GOOD, GOOD, (1, 4, 9, 32), "k and v must have the same shape"),
        (GOOD, (2, 4, 8, 32), (2, 4, 8, 32), "same batch size"),
        (GOOD, (1, 4, 8, 16), (1, 4, 8, 16), "same head dimension"),
        (GOOD, (1, 3, 8, 32), (1, 3, 8, 32), "heads of q must be a multiple"),
    ],
)
def test_shapes_that_do_not_go_together_are_value_errors(q, k, v, text):
    with pytest.raises(ValueError, match=text):
        tilebook.attention(*_tensors(q, k, v))


def test_mixed_dtypes_and_devices_are_value_errors():
    q, k, v = _tensors(GOOD, GOOD, GOOD)
    with pytest.raises(ValueError, match=r"one dtype; got torch.bfloat16, torch.float16"):
        tilebook.attention(q, k.half(), v)
    with pytest.raises(ValueError, match=r"one device; got .*meta"):
        tilebook.attention(q, k, v.to("meta"))


@pytest.mark.parametrize("text", ["B1,H6,Hkv4,S8,D64", "B1,H1,S8,D8", "B1,H1,S8,D512"])
def test_impossible_problems_are_usage_errors(text):
    with pytest.raises(UsageError):
        FORWARD.parse(text, "bf16")


def test_flops_count_the_unmasked_share():
    full = FORWARD.parse("B2,H3,S64,D16", "bf16")
    assert full.cost().flops == 4 * 2 * 3 * 64 * 64 * 16
    assert replace(full, causal=True).cost().flops == full.cost().flops / 2
    wide, tall = replace(full, seq_k=128), replace(full, seq_q=128)
    assert replace(wide, causal=True).cost().flops == wide.cost().flops / 4
    assert replace(tall, causal=True).cost().flops == tall.cost().flops * 3 / 4
    assert BACKWARD.parse(full.label, "bf16").cost().flops == 2.5 * full.cost().flops


def test_configs_that_cannot_run_say_why():
    space, problem = attention_fwd.tunable.space, FORWARD.parse("B4,H16,S4096,D128,causal", "bf16")
    good = space.default(problem, H200)
    for axes, gpu, text in (
        ({"BLOCK_N": 256, "num_stages": 4}, "H200", "shared memory"),
        ({"BLOCK_M": 256, "num_warps": 4}, "H200", "registers|warps"),
        ({"DESCRIPTORS": 1}, "A100", "sm_90"),
        ({"DESCRIPTORS": 0, "num_stages": 3}, "MI300X", "stages"),
    ):
        reason = space.reject(problem, good.replace(**axes), devices.find(gpu))
        assert reason is not None
        assert any(word in reason for word in text.split("|")), reason
    short = FORWARD.parse("B1,H1,S1,D64", "bf16")
    assert "larger than the sequence" in space.reject(short, good.replace(DESCRIPTORS=0), H200)
    assert "wait for the host" in space.reject(short, good, H200)
    assert space.feasible(short, H200)


@pytest.mark.gpu
@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("op", [attention_fwd, attention_bwd], ids=lambda op: op.name)
def test_one_binary_serves_every_size(op, descriptors):
    """Strides stay multiples of D, and sizes do not specialise; or each ragged length would compile anew."""
    config = op.tunable.space.default(op.problem.parse("B2,H4,S1000,D64", "bf16"), H200)
    binaries = set()

    def compile_only(kernel, grid, args, meta):
        binaries.add((kernel.fn.__name__, kernel.warmup(*args, grid=grid, **meta).hash))

    for batch, heads, heads_kv, n_q, n_k in (
        (1, 1, 1, 1, 1),
        (2, 3, 3, 17, 17),
        (1, 4, 1, 100, 197),
        (2, 6, 2, 1000, 1),
    ):
        q, k = (
            torch.empty(batch, h, n, 64, device="meta", dtype=torch.bfloat16)
            for h, n in ((heads, n_q), (heads_kv, n_k))
        )
        inputs = (q, q, k, k, q, torch.empty(q.shape[:-1], device="meta")) if op is attention_bwd else (q, k, k)
        with intercepted(compile_only):
            op.tunable(*inputs, PLAIN, 0.1, config=config.replace(DESCRIPTORS=descriptors))
    assert len(binaries) == (2 if op is attention_bwd else 1)
