import pytest
import torch
import torch.nn.functional as F
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.call import Entry
from tilebook.kernels.glu.form import ACTIVATIONS
from tilebook.tuner.judge.verify import Case, error, floors, verify

OPS = [op.get(name) for name in ("glu_fwd", "glu_bwd")]
FWD, BWD = OPS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

STEPS = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Of what rounding to a dtype, and arithmetic in fp32, may change, relative to a number."""

CONFIGS = [
    op.Config(ROWS=1, BLOCK=8192, num_warps=8),  # a whole row at a time
    op.Config(ROWS=1, BLOCK=512, num_warps=1),  # rows wider than 512 in pieces
    op.Config(ROWS=16, BLOCK=2048, num_warps=2),
]


def act(x, activation):
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def plain(gate, up=None, activation="silu"):
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return act(gate, activation) * up


def plain_block(x, gate, up, down, gate_bias=None, up_bias=None, down_bias=None, activation="silu"):
    wide = F.linear(x, gate, gate_bias)
    h = plain(wide, None if up is None else F.linear(x, up, up_bias), activation)
    return F.linear(h, down, down_bias)


def block(*tensors, activation="silu", **how):
    if activation == "silu":
        return tilebook.swiglu(*tensors, **how)
    return tilebook.geglu(*tensors, approximate="tanh" if activation == "gelu_tanh" else "none", **how)


def drawn(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        None if shape is None else (torch.randn(shape, generator=generator) * 0.7).to(dtype).requires_grad_()
        for shape in shapes
    ]


def weights(dtype=torch.float32, packed=False, biased=True, rows=(2, 9), inner=20):
    shapes = [(*rows, 16), *([(2 * inner, 16), None] if packed else [(inner, 16)] * 2), (12, inner)]
    biases = [(2 * inner,) if packed else (inner,), None if packed else (inner,), (12,)]
    return drawn(*shapes, *(biases if biased else [None] * 3), dtype=dtype)


def gradients(function, tensors, dy=None, **options):
    y = function(*tensors, **options)
    if dy is None:  # numbers that every dtype has
        dy = torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(7)) / 4
    return y, *torch.autograd.grad(y, [x for x in tensors if x is not None and x.requires_grad], dy.to(y.dtype))


def doubled(tensors):
    return [x if x is None else x.detach().double().requires_grad_() for x in tensors]


def assert_as_good_as_pytorch(ours, theirs, truth, dtype):
    for at, (mine, other, right) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        floor, seen, allowed = floors(right.float(), dtype, dtype), error(mine, right), error(other, right)
        assert seen.max <= 2 * allowed.max + floor.max, at
        assert seen.rms <= 2 * allowed.rms + floor.rms, at


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_other_configs_are_right_too(each, config):
    for problem in each.problem.examples():
        verify(each.tunable, config, [Case.make(each, problem, "cpu", 1)], repeats=0)


@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_every_width_has_a_default_and_a_space(gpu):
    for each in OPS:
        space = each.tunable.space
        for width in (1, 24, 1000, 4096, 11008, 65536):
            problem = each.problem.parse(f"M8192,F{width}", "bf16")
            assert space.reject(problem, space.default(problem, gpu), gpu) is None
            assert 2 <= len(space.feasible(problem, gpu)) <= 64


def test_one_verdict_serves_a_bucket_of_rows_whatever_is_asked_for_again():
    gate = torch.zeros(1000, 64)
    assert FWD.problem.of(gate, gate, "silu").label == "M1024,F64"
    assert FWD.problem.of(gate, None, "gelu").label == "M1024,F32,gelu,packed"
    for again in (False, True):
        assert BWD.problem.of(gate, gate, gate, "gelu_tanh", again).label == "M1024,F64,gelu_tanh"


@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_the_least_that_is_moved_is_each_tensor_once(each):
    for text in ("M8,F1100", "M8,F1100,packed"):
        problem = each.problem.parse(text, "bf16")
        inputs = problem.inputs("cpu", 0)
        moved = [x for x in (*inputs, *each.implementations["torch"](*inputs)) if isinstance(x, torch.Tensor)]
        assert problem.cost().bytes == sum(x.numel() * x.itemsize for x in moved)


@pytest.mark.sampled(6)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(2, 33, 100), (64,), (7, 1502), (1, 8)], ids=str)
def test_kernels_and_their_gradients_err_at_most_twice_as_much_as_pytorch(shape, packed, activation, dtype):
    tensors = drawn(shape, *([] if packed else [shape]), dtype=dtype)
    with dispatch.use("triton"):
        ours = gradients(tilebook.glu, tensors, activation=activation)
    theirs = gradients(plain, tensors, activation=activation)
    truth = gradients(plain, doubled(tensors), activation=activation)
    assert_as_good_as_pytorch(ours, theirs, truth, dtype)


@interpreted
@settings(max_examples=examples(40), deadline=None)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 1200), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
    activation=st.sampled_from(ACTIVATIONS), cut=st.integers(0, 17),
)  # fmt: skip
def test_any_shape_and_offset_is_right(rows, width, dtype, seed, activation, cut):
    wide = drawn((rows, width + cut), (rows, width + cut), dtype=dtype, seed=seed)
    tensors = [x.detach()[:, cut:].requires_grad_() for x in wide]
    with dispatch.use("triton"):
        ours = gradients(tilebook.glu, tensors, activation=activation)
    for mine, right in zip(ours, gradients(plain, doubled(tensors), activation=activation), strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=STEPS[dtype], atol=1e-6)


@interpreted
def test_one_tensor_for_both_gives_the_same_bits_and_one_gradient():
    (both,) = drawn((5, 6, 96), dtype=torch.bfloat16)
    with dispatch.use("triton"):
        y, grad = gradients(tilebook.glu, [both])
        apart, again = gradients(lambda x: tilebook.glu(*x.chunk(2, -1)), [both])
    assert torch.equal(y, apart)
    assert torch.equal(grad, again)


@interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_of_either_sign_are_right(activation):
    gate = torch.tensor([-1e4, -300.0, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 300.0, 1e4]).requires_grad_()
    up = torch.full((10,), 2.0).requires_grad_()
    with dispatch.use("triton"):
        found = gradients(tilebook.glu, [gate, up], torch.ones(10), activation=activation)
    truth = gradients(plain, doubled([gate, up]), torch.ones(10), activation=activation)
    for mine, right in zip(found, truth, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=2e-6, atol=1e-6)


@interpreted
def test_gradients_that_are_expanded_and_rows_without_columns_pass():
    gate, up = drawn((4, 8), (4, 8))
    with dispatch.use("triton"):
        y = tilebook.glu(gate, up)
        expanded = torch.autograd.grad(y.sum(), (gate, up), retain_graph=True)
        dense = torch.autograd.grad(y, (gate, up), torch.ones(4, 8))
        assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))
        for shape in ((0, 8), (4, 0), (2, 0, 8)):
            assert tilebook.glu(torch.zeros(shape), torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_on_the_cpu_it_is_pytorch_bit_for_bit(packed, activation, dtype):
    tensors = weights(dtype, packed)
    found = (gradients(each, tensors, activation=activation) for each in (block, plain_block))
    for mine, right in zip(*found, strict=True):
        assert torch.equal(mine, right)


@interpreted
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_layers_around_it_err_at_most_twice_as_much_as_pytorch(dtype, packed, biased, recompute):
    tensors = weights(dtype, packed, biased)
    for activation in ACTIVATIONS:
        with dispatch.use("triton"):
            ours = gradients(block, tensors, activation=activation, recompute=recompute)
        theirs = gradients(plain_block, tensors, activation=activation)
        truth = gradients(plain_block, doubled(tensors), activation=activation)
        assert_as_good_as_pytorch(ours, theirs, truth, dtype)


@interpreted
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (4,), (6,), (0, 3), (1, 2), (5, 6)], ids=str)
def test_any_of_its_tensors_may_be_frozen(trained):
    tensors = [x.detach().requires_grad_(at in trained) for at, x in enumerate(weights())]
    with dispatch.use("triton"):
        found = gradients(block, tensors)
    for mine, right in zip(found, gradients(plain_block, tensors), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


def kept(function, tensors, **options):
    """Numbers that are kept for the backward pass beside the tensors given."""
    given, seen = {x.untyped_storage().data_ptr() for x in tensors if x is not None}, {}

    def pack(x):
        if x.numel() and x.untyped_storage().data_ptr() not in given:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.itemsize
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function(*tensors, **options)
    assert y.requires_grad
    return sum(seen.values())


@interpreted
@pytest.mark.parametrize("packed", [False, True])
def test_gate_and_up_alone_are_kept_and_nothing_where_they_are_computed_again(packed):
    tensors = weights(packed=packed)
    numbers = 2 * 9 * 20
    assert kept(plain_block, tensors) >= 4 * numbers
    with dispatch.use("triton"):
        assert kept(block, tensors) == 2 * numbers
        assert kept(block, tensors, recompute=True) == 0
        assert kept(tilebook.glu, drawn((4, 8), (4, 8))) == 0


def test_pytorchs_functions_keep_nothing_either_where_it_is_computed_again():
    tensors = weights(biased=False)
    assert kept(block, tensors, recompute=True) <= tensors[0].numel()  # whatever is packed is packed once more
    found = gradients(block, tensors, recompute=True)
    for mine, right in zip(found, gradients(plain_block, tensors), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_are_one_graph(recompute):
    torch._dynamo.reset()
    tensors = weights()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = gradients(compiled, tensors, recompute=recompute)
    for mine, right in zip(found, gradients(plain_block, tensors), strict=True):
        torch.testing.assert_close(mine, right)


def test_a_compiled_call_asks_for_the_backward_op_where_it_is_trained(monkeypatch):
    asked = []

    def ahead(family, names, args, device):
        asked.append((family, names, args))
        return True

    ahead._dynamo_marked_constant = True
    monkeypatch.setattr("tilebook.kernels.glu.ahead", ahead)
    monkeypatch.setattr(dispatch.here, "forced", ("torch", None))  # so that the CPU counts as a GPU
    torch._dynamo.reset()
    tensors = weights()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for mine, right in zip(gradients(compiled, tensors), gradients(plain_block, tensors), strict=True):
        torch.testing.assert_close(mine, right)
    compiled(*[x.detach() for x in tensors])
    shape = (2, 9, 20), torch.float32
    assert asked[0] == ("glu", ("glu_fwd", "glu_bwd"), (shape, shape, "silu"))
    assert asked[1] == ("glu", ("glu_fwd",), (shape, shape, "silu"))


@interpreted
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_does_with_it_what_it_does_with_pytorchs_layers(packed):
    tensors = weights(packed=packed)
    with torch.autocast("cpu", torch.bfloat16):
        right = gradients(plain_block, tensors)
        with dispatch.use("triton"):
            found = gradients(block, tensors)
            assert tilebook.glu(*drawn((3, 8), (3, 8))).dtype == torch.float32
    assert [x.dtype for x in found] == [x.dtype for x in right] == [torch.bfloat16] + [torch.float32] * (len(right) - 1)
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=0, atol=0.03 * other.abs().max().item())


def test_two_dtypes_are_pytorchs_own():
    gate, up = drawn((3, 8))[0], drawn((3, 8), dtype=torch.bfloat16)[0]
    with dispatch.use("triton"):
        assert torch.equal(tilebook.glu(gate, up), plain(gate, up))


def test_the_entries_keep_what_their_backward_passes_want():
    from tilebook.kernels.glu.entry import BLOCK, GLU

    assert isinstance(GLU, Entry)
    assert GLU.kept == ()
    assert [BLOCK.outputs[which] for which in BLOCK.kept] == ["gate", "up"]


G = torch.zeros(3, 8)
WRONG = {
    "an unknown activation": (lambda: tilebook.glu(G, G, "relu"), "activation must be one of silu, gelu_tanh, gelu"),
    "no axes": (lambda: tilebook.glu(torch.zeros(()), torch.zeros(())), r"gate must be floating point \(…, F\)"),
    "integers": (lambda: tilebook.glu(G.long(), G), "gate must be floating point"),
    "an odd axis": (lambda: tilebook.glu(G[:, :7]), r"gate must be \(…, 2F\)"),
    "other shapes": (lambda: tilebook.glu(G, G[:2]), r"in one shape, not \(3, 8\) and \(2, 8\)"),
    "another device": (lambda: tilebook.glu(G, G.to("meta")), "up must be floating point on cpu"),
    "a narrow weight": (lambda: tilebook.swiglu(G, G, G[:, :7], G.t()), r"asks for up_weight \(3, 8\), not \(3, 7\)"),
    "half a weight": (lambda: tilebook.swiglu(G, G, None, G.t()), r"asks for gate_weight \(6, 8\)"),
    "a second bias": (
        lambda: tilebook.swiglu(G, torch.zeros(6, 8), None, G.t(), None, torch.zeros(3)), "up_bias must be None"
    ),
    "another dtype": (lambda: tilebook.swiglu(G, G, G.half(), G.t()), "up_weight is torch.float16"),
    "an approximation": (lambda: tilebook.geglu(G, G, G, G.t(), approximate="erf"), "approximate must be tanh or none"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_inputs_are_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
