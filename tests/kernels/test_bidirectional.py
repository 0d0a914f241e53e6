"""Linear attention in which every token sees all, with features made in its kernels."""

from contextlib import nullcontext

import pytest
import torch
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from summed_pairs import over_pairs
from torch._dynamo import config as dynamo

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.kernels.bidirectional.form import MAPS
from tilebook.nn.linear import attend
from tilebook.tuner.judge.verify import Case, verify

FWD, BWD = OPS = [op.get(f"bidirectional_linear_attention_{way}") for way in ("fwd", "bwd")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")
CONFIG = {"CHUNK": 16, "BLOCK_V": 16, "WALK": 0, "num_warps": 1, "num_stages": 1}
NAMED = [None if name == "none" else name for name in MAPS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(rows, keys, *, batch=2, heads=2, width=16, columns=16, dtype=torch.float32, seed=0, positive=False):
    source = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (keys, width), (keys, columns)
    q, k, v = (torch.randn(batch, heads, *shape, generator=source).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in ((q.abs(), k.abs(), v) if positive else (q, k, v))]


def hiding(keys, batch=2, seed=0):
    """Some keys of each sequence, never all."""
    found = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 0.6
    found[:, seed % keys] = False
    return found


def padded(q, k, v, hidden, feature_map):
    return attend(q, k, v, hidden, feature_map=feature_map, causal=False, eps=1e-6)


def gradients(o, tensors, do):
    return [o, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


def ours(tensors, hidden, feature_map, do, config=CONFIG):
    with dispatch.use("triton", op.Config(config)):
        return gradients(padded(*tensors, hidden, feature_map), tensors, do)


def exact(tensors, hidden, feature_map, do):
    wide = [x.detach().double().requires_grad_() for x in tensors]
    return gradients(over_pairs(*wide, hidden, feature_map), wide, do)


def assert_near(found, right, dtype):
    """Errors of some roundings of the largest number, and of fewer where all are counted."""
    step, least = max(torch.finfo(dtype).eps, 1e-6), 0.1 * max(each.abs().max() for each in right)
    for mine, other in zip(found, right, strict=True):
        off, size = mine.double() - other, other.abs().max() + least
        assert off.abs().max() < 12 * step * size
        assert off.square().mean().sqrt() < 3 * step * size


@pytest.mark.sampled(6)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", NAMED)
@pytest.mark.parametrize(("rows", "keys", "some"), [(1, 7, False), (17, 40, True), (66, 33, False)])
def test_outputs_and_gradients_are_those_of_the_sum_over_pairs(feature_map, rows, keys, some, dtype):
    tensors = drawn(rows, keys, dtype=dtype, seed=rows, positive=feature_map is None)
    hidden = hiding(keys) if some else torch.zeros(2, keys, dtype=torch.bool)
    do = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_near(ours(tensors, hidden, feature_map, do), exact(tensors, hidden, feature_map, do.double()), dtype)


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
@pytest.mark.parametrize(
    "shape",
    ["B1,H1,S150,K200,D16,V24,F8,performer,padded", "B1,H1,S150,K200,D16,V24", "B1,H1,S90,K200,D24,softmax,padded"],
)
def test_configs_far_from_the_default_are_feasible_and_right(each, shape):
    problem = each.problem.parse(shape, "bf16")
    case = Case.make(each, problem, "cpu", 1)
    for change in ({"WALK": 4}, {"CHUNK": 128, "num_warps": 8}, {"CHUNK": 32, "WALK": 4, "num_warps": 2}):
        config = op.Config(CONFIG | change)
        assert each.tunable.space.reject(problem, config, devices.find("H200")) is None
        verify(each.tunable, config, [case], repeats=0)


@interpreted
@pytest.mark.parametrize("scale", [0.1, 6.0])
@pytest.mark.parametrize("walk", [0, 4])
def test_performers_features_have_room_whatever_the_lengths_of_rows(scale, walk):
    """Exponents of ±300, where a divisor of all keys together leaves nothing of most features."""
    q, k, v = (scale * x.detach() for x in drawn(40, 130, batch=1, heads=1, width=32))
    tensors = [x.requires_grad_() for x in (q, k, v / scale)]
    found = ours(tensors, None, "performer", torch.ones(1, 1, 40, 16), CONFIG | {"WALK": walk})
    assert all(x.isfinite().all() for x in found)
    assert_near(found, exact(tensors, None, "performer", torch.ones(1, 1, 40, 16)), torch.bfloat16)


@pytest.mark.sampled(2)
@interpreted
@pytest.mark.parametrize("feature_map", ["elu+1", "performer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_may_be_anything_and_rows_that_see_none_are_zero(feature_map, dtype):
    q, k, v = drawn(20, 40, dtype=dtype)
    hidden = hiding(40)
    hidden[1] = True
    spoilt = [x.detach().masked_fill(hidden[:, None, :, None], torch.nan).requires_grad_() for x in (k, v)]
    found = ours([q, *spoilt], hidden, feature_map, torch.ones_like(q))
    right = ours([q, k, v], hidden, feature_map, torch.ones_like(q))
    for mine, other in zip(found, right, strict=True):
        assert torch.equal(mine, other)
        assert not mine[1].any()
    assert all(not x.masked_select(hidden[:, None, :, None]).any() for x in found[2:])


@interpreted
@pytest.mark.parametrize("feature_map", NAMED)
@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_what_is_no_number_is_none_in_outputs_and_gradients(feature_map, spoilt):
    tensors = drawn(9, 12, batch=1, heads=1, positive=feature_map is None)
    with torch.no_grad():
        tensors[spoilt][0, 0, 3, 2] = torch.nan
    found, do = ours(tensors, None, feature_map, torch.ones(1, 1, 9, 16)), torch.ones(1, 1, 9, 16)
    for mine, right in zip(found, exact(tensors, None, feature_map, do.double()), strict=True):
        assert torch.equal(mine.isnan(), right.isnan())


@interpreted
def test_gradients_of_infinity_stay_infinite_in_fp16():
    tensors = [x.detach().requires_grad_() for x in drawn(5, 5, dtype=torch.float16)]
    with torch.no_grad():
        tensors[0].fill_(-3), tensors[1].fill_(5)
    for number in (torch.inf, torch.nan):
        do = torch.ones(2, 2, 5, 16, dtype=torch.float16)
        do[..., 2, 3] = number
        assert all(not x.isfinite().all() for x in ours(tensors, None, "elu+1", do)[1:])


@interpreted
def test_numbers_of_a_mask_multiply_what_keys_count_for():
    q, k, v = drawn(20, 9)
    once = torch.zeros(2, 9)
    once[:, 2], once[:, 5] = torch.log(torch.tensor(2.0)), -torch.inf
    twice = [torch.cat((x[:, :, :5], x[:, :, 2:3], x[:, :, 6:]), 2) for x in (k, v)]
    for feature_map in ("elu+1", "softmax", "performer"):
        with dispatch.use("triton", op.Config(CONFIG)):
            found, right = padded(q, k, v, once, feature_map), padded(q, *twice, torch.zeros(2, 9), feature_map)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@interpreted
@settings(max_examples=examples(5), deadline=None)
@given(
    rows=st.integers(1, 40), keys=st.integers(1, 40), width=st.integers(1, 40), columns=st.integers(1, 40),
    feature_map=st.sampled_from(NAMED), seed=st.integers(0, 9), turned=st.booleans(),
)  # fmt: skip
def test_any_sizes_and_strides_are_right(rows, keys, width, columns, feature_map, seed, turned):
    sizes = {"heads": 1, "width": width, "columns": columns, "seed": seed, "positive": feature_map is None}
    tensors = drawn(rows, keys, **sizes)
    if turned:
        tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    do = torch.randn(2, 1, rows, columns, generator=torch.Generator().manual_seed(seed))
    hidden = hiding(keys, seed=seed)
    assert_near(ours(tensors, hidden, feature_map, do), exact(tensors, hidden, feature_map, do.double()), torch.float32)


@interpreted
def test_fp16_has_room_for_sums_over_a_long_sequence():
    q, k, v = (x.detach() for x in drawn(32, 3000, batch=1, heads=1, dtype=torch.float16))
    tensors = [x.requires_grad_() for x in (q, k, (v.abs() + 5).half())]
    do = 1e-2 * torch.ones(1, 1, 32, 16)
    found = ours(tensors, None, "elu+1", do.half(), CONFIG | {"CHUNK": 128, "WALK": 4})
    assert_near(found, exact(tensors, None, "elu+1", do.double()), torch.float16)


@pytest.mark.parametrize("feature_map", NAMED)
def test_plain_pytorch_gives_the_same(feature_map):
    tensors, hidden = drawn(9, 12, positive=feature_map is None), hiding(12)
    tensors = [x.detach().double().requires_grad_() for x in tensors]
    do = torch.randn(2, 2, 9, 16, dtype=torch.float64)
    found = gradients(padded(*tensors, hidden, feature_map), tensors, do)
    near = {"rtol": 1e-4, "atol": 1e-5} if feature_map == "performer" else {}
    for mine, right in zip(found, exact(tensors, hidden, feature_map, do), strict=True):
        torch.testing.assert_close(mine, right, **near)


@interpreted
def test_under_autocast_products_are_narrow_and_gradients_are_wide():
    tensors, do = drawn(20, 20), torch.ones(2, 2, 20, 16)
    for served in (dispatch.use("triton", op.Config(CONFIG)), dispatch.use("torch")):
        with served, torch.autocast("cpu", torch.bfloat16):
            o = tilebook.linear_attention(*tensors, feature_map="performer")
            found = gradients(o, tensors, do)
        assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
        assert_near(found, exact(tensors, None, "performer", do.double()), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.zeros(2, 5, dtype=torch.bool)}, r"a mask must be \(batch, keys\)"),
        ({"mask": torch.zeros(2, 6, dtype=torch.int)}, "in bool or fp32; got torch.int32"),
        ({"feature_map": "cosine"}, "feature_map must be one of"),
        ({"omega": torch.zeros(1, 4, 16)}, "with omega for performer alone"),
        ({"feature_map": "performer", "omega": torch.zeros(1, 4, 8)}, r"omega must be \(1, features, 16\)"),
        ({"feature_map": "performer", "omega": torch.zeros(2, 4, 16)}, r"omega must be \(1, features, 16\)"),
        ({"k": torch.zeros(2, 2, 6, 8)}, "differ in their lengths at most"),
        ({"v": torch.zeros(2, 2, 7, 16)}, "v must have the shape of k but for its head dimension"),
    ],
)
def test_what_the_op_does_not_take_is_named(change, message):
    q, k, v = drawn(5, 6)
    given = {"q": q, "k": k, "v": v, "mask": None, "omega": None, "feature_map": "relu"} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.tilebook.bidirectional_linear_attention_fwd(*given.values(), 0.25, 1e-6)


@pytest.mark.sampled(6)
@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("served", ["triton", None])
def test_performer_compiles_to_one_graph_with_any_widths_and_its_directions_a_constant(served, causal):
    def function(x):
        return tilebook.linear_attention(x, x, x, feature_map="performer", causal=causal)

    def backend(graph, given):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled, graphs = torch.compile(function, backend=backend, fullgraph=True, dynamic=True), []
    with dispatch.use(served) if served else nullcontext():
        for shape in ((2, 2, 9, 16), (2, 2, 12, 16), (2, 2, 12, 24)):
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2
    assert not any("device" in str(node.args) for each in graphs for node in each.graph.nodes)


@interpreted
def test_lengths_that_a_trace_does_not_know_are_taken_and_may_be_0():
    def function(q, k, v, seen):
        rows = seen.nonzero().flatten()
        return tilebook.linear_attention(q, k[:, :, rows], v[:, :, rows], feature_map="softmax")

    torch._dynamo.reset()
    with dispatch.use("triton", op.Config(CONFIG)), dynamo.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for seen in (torch.arange(12) % 3 == 0, torch.zeros(12, dtype=torch.bool)):
            tensors, do = drawn(9, 12), torch.ones(2, 2, 9, 16)
            found, right = (gradients(each(*tensors, seen), tensors, do) for each in (compiled, function))
            for mine, other in zip(found, right, strict=True):
                torch.testing.assert_close(mine, other)


@interpreted
def test_without_queries_or_keys_the_op_gives_what_plain_pytorch_does():
    q, k, v = drawn(9, 12)
    for tensors in ((q[:, :, :0], k, v), (q, k[:, :, :0], v[:, :, :0]), (q[:0], k[:0], v[:0])):
        with dispatch.use("triton", op.Config(CONFIG)):
            torch.library.opcheck(
                torch.ops.tilebook.bidirectional_linear_attention_fwd.default,
                (*(x.detach().requires_grad_() for x in tensors), None, None, "elu+1", 0.25, 1e-6),
            )


def test_fp64_keeps_what_a_trace_was_promised():
    tensors = [x.detach().double() for x in drawn(9, 12)]
    with dispatch.use("torch"):
        torch.library.opcheck(
            torch.ops.tilebook.bidirectional_linear_attention_fwd.default,
            (*tensors, None, None, "elu+1", 0.25, 1e-6),
        )
