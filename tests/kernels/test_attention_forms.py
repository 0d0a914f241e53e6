"""What attention can do beside plain and causal, against autograd through one formula in fp32.

Kernels run in Triton's interpreter where there is no GPU. Verification against the reference, with poison and guard
bands, is that of the examples in test_every_family.py; here the public functions are held to a formula of their own.
"""

import math
import random

import pytest
import torch
from attention_formula import BACKWARD, DEVICE, FORWARD, H200, agree, formula, shapes, tensors
from drawing import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tilebook
from tilebook import dispatch
from tilebook.kernels.attention import eager
from tilebook.kernels.attention.form import form, simplest
from tilebook.op import UsageError
from tilebook.tuner.judge.verify import Case, verify


@pytest.mark.parametrize("width", [24, 72, 80, 96, 160])
def test_head_dimensions_between_powers_of_two(width):
    agree({"causal": True}, shapes(40, 40, width=width))


@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("op", [FORWARD, BACKWARD], ids=lambda op: op.name)
def test_padding_of_the_head_dimension_neither_reads_nor_writes_beyond_it(op, descriptors):
    problem = op.problem.parse("B1,H2,S70,D40,causal", "bf16")
    config = op.tunable.space.default(problem, H200).replace(DESCRIPTORS=descriptors)
    verify(op.tunable, config, [Case.make(op, problem, DEVICE, 1)], repeats=0)


@pytest.mark.parametrize("causal", [True, "top_left", "bottom_right"])
@pytest.mark.parametrize(("n_q", "n_k"), [(40, 40), (20, 70), (70, 20), (1, 33)])
def test_causal_masks_are_aligned_as_asked(causal, n_q, n_k):
    agree({"causal": causal}, shapes(n_q, n_k))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("causal", [False, True, "bottom_right"])
@pytest.mark.parametrize("window", [(0, 0), (7, None), (None, 3), (5, 9), (-1, 0), (1000, 1000)])
def test_windows_count_from_the_diagonal(causal, window):
    agree({"causal": causal, "window": window}, shapes(50, 90))
    agree({"causal": causal, "window": window}, shapes(90, 50))


def test_long_windows_skip_tiles_and_lose_nothing():
    agree({"causal": True, "window": (100, 0)}, shapes(400, 400, heads=1, heads_kv=1, width=16))
    agree({"window": (20, 150)}, shapes(300, 420, heads=1, heads_kv=1, width=16))


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_and_its_derivative(softcap):
    agree({"softcap": softcap, "scale": 1.0}, shapes(40, 50))


@pytest.mark.parametrize("batched", [False, True])
def test_alibi_slopes_are_per_head_or_per_batch_and_head(batched):
    (slopes,) = tensors((2, 4) if batched else (4,), dtype=torch.float32)
    agree({"alibi_slopes": slopes.abs(), "causal": True}, shapes(30, 50, heads=4, batch=2))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": "bottom_right"},  # the first rows of many see nothing
        {"window": (3, 0)},
        {"attn_mask": torch.zeros(1, 1, 70, 20, dtype=torch.bool)},
        {"bias": torch.full((70, 20), -math.inf)},
        {"attn_mask": torch.arange(70)[:, None] % 2 == 0},
    ],
    ids=["causal", "window", "mask", "bias", "every other row"],
)
def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients(options):
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    agree({name: x.half() if name == "bias" else x for name, x in options.items()}, shapes(70, 20))


def test_hugely_negative_biases_are_not_infinite():
    """A row masked by the most negative number sees everything alike, as in PyTorch."""
    q, k, v = tensors(*shapes(20, 40), dtype=torch.bfloat16)
    bias = torch.full((20, 40), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16, device=DEVICE)
    with dispatch.use("triton"):
        o = tilebook.attention(q, k, v, bias=bias)
    torch.testing.assert_close(o.float(), v.float().mean(2, keepdim=True).expand(o.shape), rtol=0, atol=0.01)


def test_pytorchs_path_has_right_gradients_in_rows_of_the_most_negative_number():
    """Whose log-sum-exp is that number too, whatever their length."""
    q, k, v, do = tensors(*shapes(20, 40), (1, 2, 20, 32), dtype=torch.float32)
    bias = torch.zeros(20, 40, device=DEVICE)
    bias[3] = torch.finfo(torch.float32).min
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with dispatch.use("torch"):
        o = tilebook.attention(*inputs, bias=bias)
    truth, _ = formula(*(x.double() for x in inputs), bias=bias.double())
    found, right = (torch.autograd.grad(x, inputs, do.to(x.dtype)) for x in (o, truth))
    torch.testing.assert_close(o.double(), truth, rtol=1e-4, atol=1e-5)
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tf32", [False, True])
def test_fp32_is_served_in_full_or_in_tf32(tf32):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        agree({"causal": True}, shapes(40, 50), torch.float32, tolerance=5e-3 if tf32 and DEVICE == "cuda" else 2e-5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


options = st.fixed_dictionaries(
    {
        "causal": st.sampled_from([False, True, "top_left", "bottom_right"]),
        "window": st.none() | st.tuples(st.integers(-1, 80), st.integers(-1, 80)),
        "softcap": st.sampled_from([0.0, 2.0]),
        "alibi": st.booleans(),
        "table": st.sampled_from(["", "bias", "mask"]),
        "axes": st.tuples(*[st.booleans()] * 4),
        "n_q": st.integers(1, 90),
        "n_k": st.integers(1, 90),
        "heads": st.sampled_from([(1, 1), (2, 1), (4, 2)]),
        "width": st.sampled_from([16, 24, 40, 64]),
    }
)


def combined(n_q, n_k, heads, width, table, axes, alibi, seed=0, **plain):
    full = (2, heads[0], n_q, n_k)
    shape = tuple(n if whole else 1 for n, whole in zip(full, axes, strict=True))
    source = torch.Generator().manual_seed(seed)
    if table == "bias":
        plain["bias"] = torch.randn(shape, generator=source).to(DEVICE, torch.float16)
    if table == "mask":
        plain["attn_mask"] = (torch.rand(shape, generator=source) < 0.7).to(DEVICE)
    if alibi:
        plain["alibi_slopes"] = torch.rand(heads[0], generator=source).to(DEVICE)
    agree(plain, shapes(n_q, n_k, *heads, width, batch=2), seed=seed, tolerance=1e-2)


@settings(max_examples=examples(15), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(options)
def test_any_combination_is_right(options):
    combined(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300))
def test_random_combinations_on_the_gpu(seed):
    draw = random.Random(seed)
    window = draw.choice([None, (draw.randint(-1, 500), draw.randint(-1, 500))])
    combined(
        causal=draw.choice([False, True, "bottom_right"]),
        window=window,
        softcap=draw.choice([0.0, 0.0, 2.0]),
        alibi=draw.random() < 0.3,
        table=draw.choice(["", "bias", "mask"]),
        axes=tuple(draw.random() < 0.5 for _ in range(4)),
        n_q=draw.randint(1, 700),
        n_k=draw.randint(1, 700),
        heads=draw.choice([(1, 1), (2, 1), (4, 2), (6, 6)]),
        width=draw.choice([16, 64, 72, 80, 96, 128, 160, 256]),
        seed=seed,
    )


def test_limits_that_hide_nothing_are_not_there():
    assert simplest(100, 100, 99, 0, True) == (-1, 0, False)
    assert simplest(100, 100, 98, 0, False) == (98, 0, False)
    assert simplest(1, 100, -1, 0, True) == (-1, -1, False)
    assert simplest(40, 100, -1, 0, True) == (-1, 0, True)
    assert form(left=5, softcap=1) is form(softcap=1.0, left=5)


def test_plain_problems_keep_their_keys():
    key = '{"batch":8,"causal":true,"dtype":"bf16","head_dim":64,"heads":6,"heads_kv":6,"seq_k":196,"seq_q":196}'
    problem = FORWARD.problem.parse("B8,H6,S196,D64,causal", "bf16")
    assert problem.key == key
    assert FORWARD.problem.from_key(key) == problem
    assert FORWARD.problem.parse("B8,H6,S196,D64,causal,window500x0", "bf16").key == key
    assert "window" in FORWARD.problem.parse("B8,H6,S196,D64,causal,window50x0", "bf16").key


def test_a_gradient_of_the_bias_is_the_backward_problem_s_alone():
    assert FORWARD.problem.parse("B1,H2,S8,D16,dbiashqk", "bf16").label == "B1,H2,S8,D16,biashqk"
    assert BACKWARD.problem.parse("B1,H2,S8,D16,dbiasbhqk", "bf16").label == "B1,H2,S8,D16,dbiashqk"


@pytest.mark.parametrize("text", ["window", "window3", "windowax3", "biasqh", "maskx", "causal,causal"])
def test_malformed_forms_are_usage_errors(text):
    with pytest.raises(UsageError):
        FORWARD.problem.parse(f"B1,H1,S8,D16,{text}", "bf16")


def test_deterministic_leaves_only_what_repeats():
    q, k, v = tensors(*shapes(40, 40))
    args = (q, q, k, v, q, q[..., 0].float())
    free, strict = (BACKWARD.problem.of(*args, form(deterministic=yes), 0.2) for yes in (False, True))
    assert free.key == strict.key
    assert free.distance(strict) == 0
    assert BACKWARD.implementations["cudnn"].supports(strict)
    assert not BACKWARD.implementations["cudnn"].can_run(strict, H200)
    assert BACKWARD.tunable.can_run(strict, H200)


@pytest.mark.parametrize("change", [{"window": (-2, 0)}, {"causal": "left"}, {"dropout_p": 1.0}, {"softcap": -1.0}])
def test_options_out_of_range_are_value_errors(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        tilebook.attention(*tensors(*shapes(8, 8)), **change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bias": torch.zeros(3, 8)}, "broadcast"),
        ({"attn_mask": torch.zeros(8, 8, dtype=torch.int64)}, "boolean or floating"),
        ({"bias": torch.zeros(8, 8, dtype=torch.bool)}, "floating point"),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes must be fp32"),
        ({"alibi_slopes": torch.zeros(2, device="meta")}, "on the device of q"),
    ],
)
def test_extra_tensors_that_do_not_fit_are_value_errors(change, text):
    change = {name: x if x.is_meta else x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=text):
        tilebook.attention(*tensors(*shapes(8, 8)), **change)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "options", [{"causal": "bottom_right"}, {"window": (5, 2)}, {"softcap": 2.0}, {"dropout_p": 0.3}]
)
def test_compiled_code_gives_the_same(options):
    q, k, v = tensors(*shapes(20, 30), dtype=torch.float32)

    def call(q, k, v):
        return tilebook.attention(q, k, v, **options)

    torch.manual_seed(1)
    plain = call(q, k, v)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), plain)


def test_reference_in_pieces_is_the_reference_in_one(monkeypatch):
    problem = BACKWARD.problem.parse("B2,H4,Hkv2,S33,Sk20,D16,causal,window9x0,softcap,dbiashqk,alibi,dropout", "fp32")
    inputs = problem.inputs(DEVICE, 0)
    whole = BACKWARD.reference(*inputs)
    monkeypatch.setattr(eager, "_PIECE", 200)
    for one, other in zip(whole, BACKWARD.reference(*inputs), strict=True):
        torch.testing.assert_close(one, other)
