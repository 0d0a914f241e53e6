"""Decoding beyond what holds for every family: ragged lengths, other configs, masks, memory layouts, errors.

Without a GPU kernels run in Triton's interpreter. The rule is `Case.judge`'s: at most twice the error that PyTorch
makes in the same dtype against the fp32 truth, in maximum and RMS, plus half a rounding step of the largest value.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.kernels.decode import eager
from tilebook.kernels.decode.ops import decode
from tilebook.kernels.decode.problem import BLOCK_SIZES, DecodeProblem
from tilebook.kernels.decode.pytorch import seen
from tilebook.kernels.decode.space import splits
from tilebook.launch import intercepted
from tilebook.op import Config, UsageError
from tilebook.tuner.judge.verify import Case, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = devices.find("H200")
SPACE = decode.tunable.space
EXAMPLES = DecodeProblem.examples()

CONFIGS = {
    "narrow, many shares": Config(BLOCK_N=16, PER_SM=16, num_warps=2, num_stages=2, DESCRIPTORS=0),
    "wide, one share": Config(BLOCK_N=64, PER_SM=1, num_warps=4, num_stages=3, DESCRIPTORS=0),
    "descriptors": Config(BLOCK_N=16, PER_SM=4, num_warps=2, num_stages=2, DESCRIPTORS=1),
}


def _tensors(*shapes, dtype=torch.bfloat16, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=source).to(DEVICE, dtype) for shape in shapes]


def _ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _paged(cache, block_size, seed=0):
    """A (B, Hkv, keys, D) cache as blocks in random order, and their table; whole blocks of keys only."""
    batch, heads, keys, width = cache.shape
    blocks = cache.transpose(1, 2).reshape(-1, block_size, heads, width)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    table = torch.empty(len(blocks), dtype=torch.int32, device=DEVICE)
    table[order] = torch.arange(len(blocks), dtype=torch.int32, device=DEVICE)
    return blocks[order], table.view(batch, keys // block_size)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("axes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("problem", EXAMPLES, ids=lambda p: p.label)
def test_ragged_lengths_are_right_with_other_configs(problem, axes):
    """With a seed other than 0 lengths are random, and one is 0."""
    config = axes.replace(DESCRIPTORS=0) if problem.head_dim & (problem.head_dim - 1) else axes
    verify(decode.tunable, config, [Case.make(decode, problem, DEVICE, 1)], repeats=0)


@pytest.mark.parametrize("keys", [1, 15, 100, 197])
def test_contiguous_caches_of_any_length(keys):
    case = Case.make(decode, DecodeProblem.parse(f"B2,H4,Hkv2,S3,Sk{keys},D32,causal", "bf16"), DEVICE, 0)
    for config in CONFIGS.values():
        verify(decode.tunable, config, [case], repeats=0)


def _exact(q, k, v, lengths, causal, scale, softcap, window):
    """Row by row in fp64."""
    o, lse = torch.zeros_like(q, dtype=torch.float64), torch.full(q.shape[:-1], -torch.inf, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        position = lengths[b] - q.shape[2] + i
        keys = [j for j in range(lengths[b]) if (j <= position or not causal) and (not window or j > position - window)]
        if keys:
            scores = k[b, h // group, keys].double().cpu() @ q[b, h, i].double().cpu() * scale
            scores = softcap * (scores / softcap).tanh() if softcap else scores
            lse[b, h, i] = scores.logsumexp(0)
            o[b, h, i] = scores.softmax(0) @ v[b, h // group, keys].double().cpu()
    return o, lse


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(data=st.data())
def test_reference_and_kernel_agree_with_the_definition(data):
    draw = data.draw
    heads_kv, group, n_q = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 16))
    width, block_size = 8 * draw(st.integers(2, 6)), draw(st.sampled_from([4, 16, 24, 64]))
    lengths = draw(st.lists(st.integers(0, 2 * block_size), min_size=1, max_size=3))
    causal, softcap = draw(st.booleans()), draw(st.sampled_from([0.0, 1.5]))
    window = draw(st.none() | st.integers(1, 40))
    scale = draw(st.sampled_from([0.2, -0.2, 0.0]))
    config = draw(st.sampled_from(list(CONFIGS.values()))).replace(DESCRIPTORS=0)
    shape = len(lengths), heads_kv, 2 * block_size, width
    q, k, v = _tensors((len(lengths), heads_kv * group, n_q, width), shape, shape, dtype=torch.float16)
    expected = _exact(q, k, v, lengths, causal, scale, softcap, window)
    (k_blocks, table), (v_blocks, _) = _paged(k, block_size), _paged(v, block_size)
    for b, length in enumerate(lengths):
        table[b, -(-length // block_size) :] = -1  # not to be followed
    rest = causal, scale, softcap, window
    for args in ((q, k, v, _ints(lengths), None, *rest), (q, k_blocks, v_blocks, _ints(lengths), table, *rest)):
        for o, lse in (eager.decode(*args), decode.tunable(*args, config=config)):
            torch.testing.assert_close(o.double().cpu(), expected[0], rtol=2e-2, atol=4e-3)
            torch.testing.assert_close(lse.double().cpu(), expected[1], rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_numbers_beyond_the_end_of_a_sequence_do_not_leak(config, paged):
    q, k, v = _tensors((3, 4, 2, 32), *[(3, 2, 96, 32)] * 2)
    lengths = [50, 0, 96]
    clean = decode.tunable(q, k, v, _ints(lengths), None, True, 0.2, 0.0, None, config=config)
    for x in (k, v):
        for b, length in enumerate(lengths):
            x[b, :, length:] = torch.tensor([torch.nan, torch.inf], device=DEVICE).repeat(16)
    table = None
    if paged:
        (k, table), (v, _) = _paged(k, 16), _paged(v, 16)
    dirty = decode.tunable(q, k, v, _ints(lengths), table, True, 0.2, 0.0, None, config=config)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_rows_that_see_no_key_are_zero(config):
    """An empty sequence, and rows of a causal block that is longer than its sequence."""
    q, k, v = _tensors((2, 2, 4, 32), *[(2, 1, 64, 32)] * 2)
    o, lse = decode.tunable(q, k, v, _ints([0, 2]), None, True, 0.2, 0.0, None, config=config)
    assert (o[0] == 0).all()
    assert (o[1, :, :2] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert (lse[1, :, :2] == -torch.inf).all()
    assert lse[1, :, 2:].isfinite().all()
    torch.testing.assert_close(o[1, :, 2], v[1, 0, :1].expand(2, -1))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_windows_and_causal_edges_anywhere_in_a_tile(causal):
    """Each row's first and last key at every place in a tile of 16."""
    lengths = list(range(48, 64))
    q, k, v = _tensors((16, 1, 8, 16), *[(16, 1, 64, 16)] * 2, dtype=torch.float16)
    args = q, k, v, _ints(lengths), None, causal, 0.25, 0.0, 9
    o, lse = decode.tunable(*args, config=CONFIGS["narrow, many shares"])
    expected = _exact(q, k, v, lengths, *args[5:])
    torch.testing.assert_close(o.double().cpu(), expected[0], rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(lse.double().cpu(), expected[1], rtol=2e-3, atol=4e-3)


def test_lengths_out_of_range_are_held_to_what_the_cache_has():
    q, k, v = _tensors((2, 2, 1, 32), *[(2, 1, 64, 32)] * 2)
    config = CONFIGS["narrow, many shares"]
    ours = decode.tunable(q, k, v, _ints([-3, 1000]), None, False, 0.2, 0.0, None, config=config)
    held = decode.tunable(q, k, v, _ints([0, 64]), None, False, 0.2, 0.0, None, config=config)
    assert all(torch.equal(a, b) for a, b in zip(ours, held, strict=True))


@pytest.mark.parametrize("descriptors", [0, 1])
def test_any_strides_will_do(descriptors):
    """Caches kept as (B, S, H, D) with room for more, a strided q, lengths and a table cut from larger ones."""
    wide = _tensors((2, 2, 80, 2, 32))[0]
    k, v = (x[:, :64].transpose(1, 2) for x in wide.unbind(1))
    q = _tensors((2, 3, 4, 32), seed=1)[0].transpose(1, 2)
    lens = _ints([[40, 0], [64, 0]])[:, 0]
    config = CONFIGS["narrow, many shares"].replace(DESCRIPTORS=descriptors)
    rest = True, 0.2, 0.0, None
    dense = [x.contiguous() for x in (q, k, v, lens)]
    expected = decode.tunable(*dense, None, *rest, config=config)
    o, lse = decode.tunable(q, k, v, lens, None, *rest, config=config)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    assert o.transpose(1, 2).is_contiguous()  # as q lies in memory
    turned = q.mT.contiguous().mT
    assert torch.equal(decode.tunable(turned, k, v, lens, None, *rest, config=config)[0], expected[0])
    (k_blocks, table), (v_blocks, _) = _paged(dense[1], 16), _paged(dense[2], 16)
    for cut in (F.pad(table, (0, 3))[:, :4], table.t().contiguous().t()):
        assert torch.equal(decode.tunable(q, k_blocks, v_blocks, lens, cut, *rest, config=config)[0], expected[0])


def test_the_public_function_runs_the_kernel_and_returns_what_is_asked_for():
    q, k, v = _tensors((2, 4, 1, 64), *[(2, 2, 96, 64)] * 2)
    lens = _ints([96, 33])
    exact = F.scaled_dot_product_attention(q[1:].float(), *(x[1:, :, :33].float() for x in (k, v)), enable_gqa=True)
    with dispatch.use("triton"):
        o, lse = tilebook.attention_decode(q, k, v, seq_lens=lens, return_lse=True)
        assert torch.equal(tilebook.attention_decode(q, k, v, seq_lens=lens), o)
    torch.testing.assert_close(o[1:].float(), exact, rtol=1e-2, atol=4e-3)
    assert (o.dtype, lse.dtype, lse.shape) == (torch.bfloat16, torch.float32, (2, 4, 1))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU our kernels serve this call")
def test_on_the_cpu_it_is_eager_pytorch():
    q, k, v = _tensors((2, 4, 3, 24), *[(2, 2, 50, 24)] * 2, dtype=torch.float32)
    mask = torch.ones(3, 50, dtype=torch.bool).tril(47)  # aligned at the bottom right
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(tilebook.attention_decode(q, k, v), expected)


def test_compiled_by_torch_it_is_one_graph_of_pytorch_operations():
    q, k, v = _tensors((2, 4, 1, 32), *[(2, 2, 48, 32)] * 2)
    lens = _ints([48, 20])
    compiled = torch.compile(tilebook.attention_decode, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(q, k, v, seq_lens=lens), tilebook.attention_decode(q, k, v, seq_lens=lens), rtol=2e-2, atol=4e-3
    )


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ([(1, 2, 17, 32), (1, 2, 40, 32)], torch.bfloat16),
        ([(1, 2, 1, 20), (1, 2, 40, 20)], torch.bfloat16),
        ([(1, 2, 1, 32), (1, 2, 40, 32)], torch.float64),
        ([(0, 2, 1, 32), (0, 2, 40, 32)], torch.bfloat16),
        ([(1, 2, 0, 32), (1, 2, 40, 32)], torch.bfloat16),
        ([(1, 2, 1, 32), (1, 2, 0, 32)], torch.bfloat16),
    ],
    ids=["many rows", "odd head dimension", "fp64", "no batch", "no rows", "no keys"],
)
def test_what_our_kernels_do_not_serve_goes_to_pytorch(shapes, dtype):
    q, k, v = _tensors(shapes[0], shapes[1], shapes[1], dtype=dtype)
    with dispatch.use("triton"):
        o, lse = tilebook.attention_decode(q, k, v, causal=False, return_lse=True)
    expected = F.scaled_dot_product_attention(q, k, v) if k.numel() else torch.zeros_like(q)
    torch.testing.assert_close(o, expected, rtol=2e-2, atol=8e-3)
    assert lse.shape == q.shape[:-1]


GOOD = (2, 4, 1, 32), (2, 2, 48, 32), (2, 2, 48, 32)


@pytest.mark.parametrize(
    ("shapes", "options", "text"),
    [
        ((GOOD[0][1:], *GOOD[1:]), {}, "four dimensions"),
        ((*GOOD[:2], (2, 2, 47, 32)), {}, "k and v must have the same shape"),
        (((2, 4, 1, 16), *GOOD[1:]), {}, "same head dimension"),
        (((2, 3, 1, 32), *GOOD[1:]), {}, "heads of q must be a multiple"),
        (((3, 4, 1, 32), *GOOD[1:]), {}, "same batch size"),
        (((2, 48, 1, 32), *GOOD[1:]), {"block_table": [[0], [1]]}, "a block table needs seq_lens"),
        (GOOD, {"seq_lens": [1]}, r"seq_lens must have shape \(B,\) with B = 2, not \(1,\)"),
        (((2, 48, 1, 32), *GOOD[1:]), {"seq_lens": [1, 2], "block_table": [0, 1]}, r"shape \(B, blocks\)"),
        (GOOD, {"softcap": -1.0}, "softcap must not be negative"),
        (GOOD, {"window": 0}, "window must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_a_value_error(shapes, options, text):
    options = {name: _ints(value) if isinstance(value, list) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=text):
        tilebook.attention_decode(*_tensors(*shapes), **options)


def test_dtypes_devices_and_gradients_that_cannot_be_had_are_value_errors():
    q, k, v = _tensors(*GOOD)
    with pytest.raises(ValueError, match=r"one dtype; got torch.bfloat16, torch.float16"):
        tilebook.attention_decode(q, k.half(), v)
    with pytest.raises(ValueError, match=r"must be int32, not torch.int64"):
        tilebook.attention_decode(q, k, v, seq_lens=_ints([1, 2]).long())
    with pytest.raises(ValueError, match=r"one device; got .*meta"):
        tilebook.attention_decode(q, k, v.to("meta"))
    q.requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        tilebook.attention_decode(q, k, v)
    with torch.no_grad():
        assert not tilebook.attention_decode(q, k, v).requires_grad


@pytest.mark.parametrize("text", ["B1,H6,Hkv4,S1,Sk8,D64", "B1,H1,S17,Sk64,D64", "B1,H1,S1,Sk64,D20",
                                  "B1,H1,S1,Sk64,D512", "B1,H1,S1,Sk64,D64,paged16,ragged"])  # fmt: skip
def test_impossible_problems_are_usage_errors(text):
    with pytest.raises(UsageError):
        DecodeProblem.parse(text, "bf16")


def test_a_growing_cache_keeps_its_problem_until_a_power_of_two():
    def problem(keys, window=None):
        q, k, v = (torch.empty(shape, device="meta") for shape in ((1, 4, 1, 64), *[(1, 2, keys, 64)] * 2))
        return DecodeProblem.of(q, k, v, None, None, True, 0.1, 0.0, window)

    assert problem(1025) == problem(2048) == problem(2048, window=5000)
    assert problem(2049) != problem(2048)
    assert problem(1500, window=1024).window == 1024


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("window", [1, 7, 45, 46, 48, 100])
def test_full_caches_are_read_from_their_window_on(rows, window):
    q, k, v = _tensors((2, 4, rows, 32), *[(2, 2, 48, 32)] * 2)
    options = True, 0.2, 0.0, window
    expected = eager.decode(q, k, v, None, None, *options)
    keys, values, left = seen(q, k, v, window)
    assert keys.shape == values.shape == (2, 2, min(48, window + rows - 1), 32)
    assert left == (None if rows == 1 else window)
    _same(eager.decode(q, keys, values, None, None, *options[:-1], left), expected)
    _same(tilebook.attention_decode(q, k, v, scale=0.2, window=window, return_lse=True), expected)
    _same((tilebook.attention_decode(q, k, v, scale=0.2, window=window),), expected[:1])


def _same(found, expected):
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.float(), its.float(), rtol=2e-2, atol=4e-3)


def test_one_row_in_a_window_of_a_full_cache_is_the_problem_of_a_short_cache():
    q, k, v = (torch.empty(shape, device="meta") for shape in ((1, 4, 1, 64), *[(1, 2, 3000, 64)] * 2))
    keys, values, window = seen(q, k, v, 1024)
    assert DecodeProblem.of(q, keys, values, None, None, True, 0.1, 0.0, window).label == "B1,H4,Hkv2,S1,Sk1024,D64"


def test_sizes_that_follow_from_others_do_not_count_twice_in_a_distance():
    one, far, windowed = (
        DecodeProblem.parse(f"B1,H4,S1,{keys},D64", "bf16") for keys in ("Sk1024", "Sk4096", "Sk4096,W1024")
    )
    assert one.distance(far) == far.distance(one) == 2
    assert far.distance(windowed) == 2
    assert one.distance(DecodeProblem.parse("B1,H4,S1,Sk1024,D64,paged16", "bf16")) == math.inf


def test_the_floor_is_one_reading_of_the_visible_keys_and_values():
    full = DecodeProblem.parse("B16,H32,Hkv8,S1,Sk8192,D128", "bf16").cost().bytes
    assert full == pytest.approx(2 * 16 * 8 * 8192 * 128 * 2, rel=1e-3)
    assert DecodeProblem.parse("B16,H32,Hkv8,S1,Sk8192,W1024,D128", "bf16").cost().bytes < full / 7


def test_shares_fill_the_gpu_once_and_never_outnumber_the_tiles():
    config = CONFIGS["wide, one share"]
    assert [splits(128, 8192, config.replace(PER_SM=n), 132) for n in (1, 2, 4, 16)] == [1, 2, 4, 16]
    assert splits(8, 131072, config.replace(PER_SM=2), 132) == 33
    assert splits(8, 100, config.replace(PER_SM=2), 132) == 2
    assert splits(512, 8192, config, 132) == 1


@pytest.mark.parametrize("cache", ["contiguous", *(f"paged{n}" for n in BLOCK_SIZES)])
def test_every_cache_has_a_space(cache):
    problem = DecodeProblem.parse(f"B16,H32,Hkv8,S1,Sk8192,D128,{cache}", "bf16")
    for gpu in devices.CATALOGUE.values():
        feasible = SPACE.feasible(problem, gpu)
        assert len(feasible) > 50
        described = [config for config in feasible if config["DESCRIPTORS"]]
        assert bool(described) == (gpu.capability >= 90)
        assert all(problem.block_size % config.number("BLOCK_N") == 0 for config in described)


@pytest.mark.gpu
def test_one_binary_serves_every_size():
    """Strides stay multiples of D, and sizes do not specialise; or each length of a cache would compile anew."""
    config = CONFIGS["narrow, many shares"]
    binaries = set()

    def compile_only(kernel, grid, args, meta):
        if kernel.fn.__name__ == "decode_kernel":
            binaries.add(kernel.warmup(*args, grid=grid, **meta).hash)

    for batch, heads_kv, keys in ((1, 1, 1000), (2, 3, 1001), (16, 2, 4096)):
        q, k = (torch.empty(batch, h, n, 64, device="meta", dtype=torch.bfloat16)
                for h, n in ((4 * heads_kv, 1), (heads_kv, keys)))  # fmt: skip
        with intercepted(compile_only):
            decode.tunable(q, k, k, None, None, False, 0.1, 0.0, None, config=config)
    assert len(binaries) == 1


def test_a_wrong_call_of_the_op_is_a_value_error():
    q, k = torch.zeros(2, 4, 1, 64, dtype=torch.bfloat16), torch.zeros(3, 2, 8, 64, dtype=torch.bfloat16)
    with dispatch.use("triton"), pytest.raises(ValueError, match="same batch size"):
        torch.ops.tilebook.attention_decode(q, k, k, None, None, True, 0.125, 0.0, None)
