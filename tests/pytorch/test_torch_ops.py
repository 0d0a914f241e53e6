"""Every op of ours is to PyTorch what an op of its own is: schema, shapes, gradients, transforms, counts."""

import pytest
import torch
import torch.nn.functional as F
from op_samples import (
    BF16,
    DIFFERENTIABLE,
    EACH,
    OPS,
    SAMPLES,
    attention,
    called,
    data,
    decode,
    ends,
    forward,
    gradients,
    normal,
    qkv,
    results,
    sample,
    tensors_of,
    varlen,
    wanted,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tilebook import dispatch

each = pytest.mark.parametrize(("op", "name"), EACH)
differentiable = pytest.mark.parametrize(("op", "name"), DIFFERENTIABLE)


def test_every_op_has_samples():
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("tilebook::")]
    assert {name.removeprefix("tilebook::").replace("_bwd", "_fwd") for name in schemas} == set(SAMPLES)


CHECKS = ["test_schema", "test_faketensor", "test_autograd_registration"]
LAYOUTS = {
    *("turned", "heads first", "heads after rows", "window, heads after rows", "last axis first", "expanded"),
    *("batches", "batches of columns", "halves"),
}
"""Samples that differ from others in how tensors lie in memory, which a trace leaves to fake tensors."""


@pytest.mark.sampled(8, by="op")
@pytest.mark.filterwarnings("ignore")
@each
def test_opcheck(op, name):
    torch.library.opcheck(forward(op), sample(op, name), test_utils=CHECKS)


@pytest.mark.sampled(24)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in EACH if name not in LAYOUTS])
def test_opcheck_of_what_is_traced_with_symbols(op, name):
    torch.library.opcheck(forward(op), sample(op, name), test_utils="test_aot_dispatch_dynamic")


def backward_of(op, name):
    """The backward op, and arguments for it."""
    args = sample(op, name)
    count = len(tensors_of(args)) + sum(x is None for x in args[:7])
    inputs, options = args[:count], args[count:]
    outputs = called(op)(*args)
    kept = {"attention_fwd": outputs, "attention_varlen_fwd": outputs}.get(op, outputs[results(op) :])
    if op == "bidirectional_linear_attention_fwd":
        kept = outputs
    if op in ("linear_attention_fwd", "mlstm_fwd"):
        kept = outputs[0], outputs[2]
    if op.startswith("add_"):  # h is in the place of what it is the sum of
        inputs = (outputs[1], *inputs[2:])
    needs = [x is not None and x.requires_grad for x in inputs]
    given = (*map(torch.randn_like, outputs[: results(op)]), *inputs, *kept)
    return getattr(OPS, op.replace("_fwd", "_bwd")).default, [
        *(x if x is None else x.detach() for x in given), *options, needs
    ]  # fmt: skip


@pytest.mark.sampled(8, by="op")
@pytest.mark.filterwarnings("ignore")
@differentiable
def test_opcheck_of_the_backward_op(op, name):
    torch.library.opcheck(*backward_of(op, name), test_utils=CHECKS)


# Nothing that others do could break a gradient of these in a trace.
ENOUGH = [(op, name) for op, name in DIFFERENTIABLE if name in (next(iter(SAMPLES[op])), "no rows", "bf16")]


@pytest.mark.sampled(6)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("op", "name"), ENOUGH)
def test_opcheck_of_the_backward_op_traced_with_symbols(op, name):
    torch.library.opcheck(*backward_of(op, name), test_utils="test_aot_dispatch_dynamic")


@pytest.mark.sampled(6, by="op")
@differentiable
def test_backward_is_right_whatever_the_strides_of_what_was_kept(op, name):
    backward, args = backward_of(op, name)
    spread = [x if not isinstance(x, torch.Tensor) or not x.ndim else torch.stack([x, x], -1)[..., 0] for x in args]
    how = {"atol": 0.02, "rtol": 0.02} if args[0].dtype == BF16 else {}
    for choice in ("torch", "triton"):
        with dispatch.use(choice):
            for got, expected in zip(backward(*spread), backward(*args), strict=True):
                torch.testing.assert_close(got, expected, **how)


@pytest.mark.sampled(8, by="op")
@each
def test_outputs_lie_in_memory_as_fake_ones_do(op, name):
    args = sample(op, name)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = called(op)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    theirs = called(op)(*args)
    near = {"rtol": 0.04, "atol": 0.04} if args[0].dtype in (BF16, torch.float16) else {"rtol": 1e-3, "atol": 1e-3}
    for choice in ("torch", "triton"):
        with dispatch.use(choice):
            real = called(op)(*args)
        torch.testing.assert_close(real[: results(op)], theirs[: results(op)], **near)
        assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in fake]
        assert [x.stride() for x in real if x.numel()] == [x.stride() for x in fake if x.numel()]


# vmap


def looped(op, args, dims, size):
    parts = [op(*[x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True)]) for i in range(size)]
    return [torch.stack(each) for each in zip(*parts, strict=True)]


def batch(args, which, size, dim):
    """The arguments with those numbered as batches, along their axis `dim`, and the axes."""
    made, dims = list(args), [None] * len(args)
    for at in which:
        x = torch.stack([args[at] * (1 + i) for i in range(size)], dim)
        made[at], dims[at] = x.detach().requires_grad_(args[at].requires_grad), dim
    return made, dims


BATCHED = [
    ("attention_fwd", "full", (0, 1, 2), 0),
    ("attention_fwd", "full", (0, 1, 2), 2),
    ("attention_fwd", "full", (0,), 1),
    ("attention_fwd", "causal, grouped", (1, 2), 0),
    ("attention_fwd", "bias", (0, 1, 2), 0),
    ("attention_fwd", "bias", (3,), 0),
    ("attention_fwd", "slopes", (0,), 0),
    ("attention_fwd", "dropout", (0, 2), 0),
    ("attention_varlen_fwd", "full, grouped", (0, 1, 2), 0),
    ("attention_decode", "rows", (0, 1, 2), 0),
    ("attention_decode", "lengths", (0,), 1),
    ("attention_decode", "pages", (0,), 0),
    ("mlp_fwd", "gelu", (0,), 0),
    ("mlp_fwd", "gelu", (1, 3), 1),
    ("mlp_fwd", "not kept", (0,), 0),
    ("glu_fwd", "silu", (0, 1), 1),
    ("glu_fwd", "gelu, packed", (0,), 0),
    ("glu_fwd", "silu", (1,), 0),
    ("gated_mlp_fwd", "silu", (0,), 0),
    ("gated_mlp_fwd", "packed", (1, 3), 1),
    ("rope_fwd", "grouped", (0, 1), 0),
    ("rope_fwd", "interleaved", (1,), 2),
    ("rms_norm_fwd", "plain", (0,), 1),
    ("rms_norm_fwd", "plain", (1,), 0),
    ("layer_norm_fwd", "plain", (0, 2), 1),
    ("layer_norm_fwd", "no bias", (1,), 0),
]


@pytest.mark.parametrize(("op", "name", "which", "dim"), BATCHED)
def test_vmap_is_a_loop(op, name, which, dim):
    args, dims = batch(sample(op, name), which, 3, dim)
    found = torch.vmap(called(op), tuple(dims))(*args)
    for got, expected in zip(found, looped(called(op), args, dims, 3), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("op", "name", "which", "dim"), [each for each in BATCHED if each[0] != "attention_decode"])
def test_gradients_pass_through_vmap(op, name, which, dim):
    args, dims = batch(sample(op, name), which, 3, dim)
    if not wanted(args):
        return
    dy = [torch.randn_like(each) for each in looped(called(op), args, dims, 3)[: results(op)]]
    found = gradients(torch.vmap(called(op), tuple(dims)), args, dy)
    expected = gradients(lambda *given: looped(called(op), given, dims, 3), args, dy)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)


def test_vmap_of_vmap():
    args, dims = batch(attention(*(normal(2, 2, 4, 5, 16) for _ in range(3))), (0, 1, 2), 3, 0)
    found = torch.vmap(torch.vmap(forward("attention_fwd"), tuple(dims)), tuple(dims))(*args)[0]
    flat = [x.flatten(0, 2) if isinstance(x, torch.Tensor) else x for x in args]
    torch.testing.assert_close(found.flatten(0, 2), forward("attention_fwd")(*flat)[0])


@pytest.mark.sampled(3)
@differentiable
def test_gradients_of_a_batch_of_directions(op, name):
    args = sample(op, name)
    if not wanted(args):
        return
    ys = [y for y in called(op)(*args)[: results(op)] if y.requires_grad]
    dys = [torch.stack([torch.randn_like(y) for _ in range(3)]) for y in ys]
    found = torch.autograd.grad(ys, wanted(args), dys, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        alone = torch.autograd.grad(ys, wanted(args), [dy[i] for dy in dys], retain_graph=True)
        for got, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(got[i], expected)


# Autocast


def test_autocast_casts_factors_and_nothing_else():
    q, k, v, slopes, bias = *qkv(), data(4).abs() / 3, normal(1, 4, 5, 7)
    with torch.autocast("cpu", BF16):
        o, lse = OPS.attention_fwd(*attention(q, k, v, bias, slopes))
    assert (o.dtype, lse.dtype) == (BF16, torch.float32)
    expected, right = OPS.attention_fwd(*attention(q.to(BF16), k.to(BF16), v.to(BF16), bias, slopes))
    assert torch.equal(o, expected)
    assert torch.equal(lse, right)
    found = torch.autograd.grad(o.float().sum(), (q, k, v, bias))
    assert [x.dtype for x in found] == [torch.float32] * 4
    for got, again in zip(found, torch.autograd.grad(expected.float().sum(), (q, k, v, bias)), strict=True):
        assert torch.equal(got, again)


def test_autocast_casts_layers_and_packed_sequences():
    layers = sample("mlp_fwd", "gelu")
    packed = sample("attention_varlen_fwd", "full, grouped")
    with torch.autocast("cpu", BF16):
        y, z = OPS.mlp_fwd(*layers)
        o, _ = OPS.attention_varlen_fwd(*packed)
    assert (y.dtype, z.dtype, o.dtype) == (BF16, BF16, BF16)


def test_autocast_leaves_norms_and_double_precision_alone():
    with torch.autocast("cpu", BF16):
        assert OPS.rms_norm_fwd(normal(5, 8), normal(8), 1e-6)[0].dtype == torch.float32
        double = [x.double() for x in qkv(data)]
        assert OPS.attention_fwd(*attention(*double))[0].dtype == torch.float64


# Counts of operations


def counted(function, *args):
    """Floating-point operations of a call, and of its backward pass where gradients are wanted."""
    with FlopCounterMode(display=False) as forwards:
        y = function(*args)
        y = y[0] if isinstance(y, tuple) else y
    if not y.requires_grad:
        return forwards.get_total_flops(), 0
    with FlopCounterMode(display=False) as backwards:
        y.sum().backward()
    return forwards.get_total_flops(), backwards.get_total_flops()


def attended(q, k, v):
    """As PyTorch counts the operations of its attention's kernels, forward and backward, with a key for each head."""
    shapes = q.shape, *((*q.shape[:2], *x.shape[2:]) for x in (k, v))
    return sdpa_flop_count(*shapes), sdpa_backward_flop_count(q.shape, *shapes)


@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_operations_are_counted_as_those_of_pytorchs_attention(right, heads_kv):
    q, k, v = qkv(heads_kv=heads_kv)
    assert counted(OPS.attention_fwd, *attention(q, k, v, right=right)) == attended(q, k, v)


@pytest.mark.parametrize("name", ["gelu", "first layer frozen", "second layer frozen"])
def test_operations_are_counted_as_those_of_pytorchs_layers(name):
    args = sample("mlp_fwd", name)

    def plain(x, w1, b1, w2, b2, *_):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    assert counted(OPS.mlp_fwd, *args) == counted(plain, *args)


@pytest.mark.parametrize(
    "name", ["silu", "gelu, no biases", "packed", "first layer frozen", "second layer frozen", "only a bias trained"]
)
def test_operations_are_counted_as_those_of_pytorchs_gated_layers(name):
    args = sample("gated_mlp_fwd", name)

    def plain(x, gate, up, down, gate_bias, up_bias, down_bias, *_):
        wide = F.linear(x, gate, gate_bias)
        g, u = wide.chunk(2, -1) if up is None else (wide, F.linear(x, up, up_bias))
        return F.linear(F.silu(g) * u, down, down_bias)

    assert counted(OPS.gated_mlp_fwd, *args) == counted(plain, *args)


def test_operations_are_counted_as_those_of_pytorchs_norm():
    x, w, eps = sample("rms_norm_fwd", "plain")
    assert counted(OPS.rms_norm_fwd, x, w, eps) == counted(lambda: F.rms_norm(x, (8,), w, eps))


def test_operations_of_decoding_are_those_of_the_cache():
    q, k, v = qkv(data, rows=1)
    assert counted(OPS.attention_decode, *decode(q, k, v))[0] == attended(q, k, v)[0]
    pages = sample("attention_decode", "pages")
    assert counted(OPS.attention_decode, *pages)[0] == 4 * 2 * 4 * 1 * 16 * (2 * 4), "two pages of four keys each"


def test_operations_of_packed_sequences_are_those_of_each_alone():
    packed = varlen(*(normal(9, 4, 16) for _ in range(3)), *(ends(4, 9),) * 2, 5, 5)
    alone = [attended(*(normal(1, 4, n, 16) for _ in range(3))) for n in (4, 5)]
    assert counted(OPS.attention_varlen_fwd, *packed) == tuple(map(sum, zip(*alone, strict=True)))


def test_operations_of_packed_sequences_in_a_trace_are_those_of_the_longest():
    packed = varlen(*(data(9, 4, 16) for _ in range(3)), *(ends(4, 9),) * 2, 5, 5)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in packed]
        found = counted(OPS.attention_varlen_fwd, *fake)
    assert found[0] == 2 * attended(*(data(1, 4, 5, 16) for _ in range(3)))[0]


# Traces, checkpoints, second derivatives


# Symbols stand for lengths of two and more.
TRACED = [(op, name, "real") for op, name in EACH] + [
    (op, name, "symbolic") for op, name in EACH if name not in ("no rows", "no columns", "no sequences")
]


@pytest.mark.sampled(8, by="op")
@pytest.mark.parametrize(("op", "name", "mode"), TRACED)
def test_make_fx_keeps_the_op_whole(op, name, mode):
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in sample(op, name)]
    at = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]

    def call(*tensors):
        given = list(args)
        for i, x in zip(at, tensors, strict=True):
            given[i] = x
        return called(op)(*given)

    graph = make_fx(call, tracing_mode=mode)(*tensors_of(args))
    assert forward(op) in [node.target for node in graph.graph.nodes]
    for got, expected in zip(graph(*tensors_of(args)), call(*tensors_of(args)), strict=True):
        torch.testing.assert_close(got, expected)


def test_what_fits_gets_no_second_derivative_from_the_backward_op():
    q, k, v = qkv()
    o, lse = OPS.attention_fwd(*attention(q, k, v))
    dy, needs = torch.randn_like(o).requires_grad_(), [True] * 3 + [False] * 3
    dq, *_ = OPS.attention_bwd(dy, *attention(q, k, v)[:6], o, lse, *attention(q, k, v)[6:], needs)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("attention_fwd", "full"),
        ("attention_fwd", "causal, grouped"),
        ("attention_fwd", "bias"),
        ("attention_fwd", "window"),
        ("attention_varlen_fwd", "full, grouped"),
        ("mlp_fwd", "gelu"),
        ("glu_fwd", "silu"),
        ("gated_mlp_fwd", "silu"),
        ("gated_mlp_fwd", "recomputed, packed"),
        ("rope_fwd", "grouped"),
        ("rms_norm_fwd", "plain"),
        ("layer_norm_fwd", "plain"),
    ],
)
def test_second_derivatives_are_those_of_pytorchs_own_functions(op, name):
    args = [x.detach().double().requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else x
            for x in sample(op, name)]  # fmt: skip
    at = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.requires_grad]

    def call(*tensors):
        given = list(args)
        for i, x in zip(at, tensors, strict=True):
            given[i] = x
        return called(op)(*given)[: results(op)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(call, [args[i] for i in at], atol=1e-4, fast_mode=True)
