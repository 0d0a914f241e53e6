"""Public functions answered without Python on a GPU: PyTorch's numbers, counted, and not where a graph is captured."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import dispatch, native
from tilebook.native import gates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gates.SUPPORTED, reason="the interpreter's own calls pass gates by"),
]


@pytest.fixture(autouse=True)
def _open():
    if not native.available():
        pytest.skip("the extension is not built: python -m tilebook.native")
    dispatch.reload()


def drawn(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def heads(heads_kv=2, rows=64, keys=64):
    return [drawn(1, 2, rows, 64), drawn(1, heads_kv, keys, 64, seed=1), drawn(1, heads_kv, keys, 64, seed=2)]


def layers(*rows):
    shapes = (*(rows or (32,)), 64), (128, 64), (128,), (64, 128), (64,)
    return [drawn(*shape, seed=seed) / 4 for seed, shape in enumerate(shapes)]


LABELS = torch.arange(16)

if torch.cuda.is_available():
    BIAS = drawn(1, 2, 64, 64, seed=3)
    SEEN = (torch.arange(64, device="cuda") < 40)[None, None, None].expand(1, 2, 64, 64)
    ROWS = torch.rand(1, 1, 64, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(4)) < 0.5
    ROWS[:, :, 3:7] = False

CALLS = {
    "attention": (tilebook.attention, F.scaled_dot_product_attention, heads()),
    "attention, causal, grouped": (
        partial(tilebook.attention, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        heads(1),
    ),
    "attention, bias": (
        lambda q, k, v: tilebook.attention(q, k, v, bias=BIAS),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS),
        heads(),
    ),
    "attention, mask": (
        lambda q, k, v: tilebook.attention(q, k, v, attn_mask=SEEN),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN[:, :1, :1].to(q.dtype).log().expand(1, 2, 64, 64)),
        heads(),
    ),
    "attention, mask, rows that see nothing": (
        lambda q, k, v: tilebook.attention(q, k, v, attn_mask=ROWS),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ROWS.to(q.dtype).log()),
        heads(),
    ),
    "rms norm": (tilebook.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [drawn(16, 1024), drawn(1024)]),
    "layer norm": (
        tilebook.layer_norm,
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5),
        [drawn(16, 1024), drawn(1024), drawn(1024, seed=1)],
    ),
    "mlp": (tilebook.mlp, lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2), layers()),
    "mlp, relu, 3 axes": (
        partial(tilebook.mlp, activation="relu"),
        lambda x, w1, b1, w2, b2: F.linear(F.relu(F.linear(x, w1, b1)), w2, b2),
        layers(2, 16),
    ),
    "loss": (
        lambda x: tilebook.cross_entropy(x, LABELS.to(x.device)),
        lambda x: F.cross_entropy(x, LABELS.to(x.device)),
        [drawn(16, 1024)],
    ),
} if torch.cuda.is_available() else {}  # fmt: skip


def answered():
    """Calls since last asked that were answered without Python."""
    extension = gates._gates._extension
    return 0 if extension is None else sum(calls for _, calls in extension.gates_counted())


def settled(call):
    for _ in range(8):
        call()
    answered()


@pytest.mark.parametrize("name", CALLS)
def test_answers_are_pytorchs(name):
    ours, theirs, args = CALLS[name]
    with torch.no_grad():
        settled(lambda: ours(*args))
        found = ours(*args)
        assert answered() == 1
        torch.testing.assert_close(found, theirs(*args), rtol=0, atol=0)


@pytest.mark.parametrize("inside", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_pytorchs(name, inside):
    ours, theirs, args = CALLS[name]
    if inside is not None and "mlp" in name:
        args = [x.float() for x in args]
    leaves = [x.clone().requires_grad_() for x in args]

    def step(function):
        with torch.autocast("cuda", torch.bfloat16, enabled=inside is not None):
            y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    settled(lambda: step(ours))
    found, counted, expected = step(ours), answered(), step(theirs)
    if "norm" in name or "loss" in name:  # which autocast has in fp32, and ours in the dtype of x
        expected = [x.to(y.dtype) for x, y in zip(expected, found, strict=True)]
    assert counted == 1
    if inside is None:  # under autocast gradients of an MLP's weights are not rounded to bf16 on their way
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for mine, right in zip(found, expected, strict=True):
        assert (mine.float() - right.float()).norm() <= 2e-2 * right.float().norm()


def test_what_the_host_bounds_runs_ours_in_a_graph():
    q, k, v = (drawn(8, 6, 196, 64, seed=seed) for seed in range(3))  # of which the shipped verdict has ours ahead
    with torch.no_grad():
        settled(lambda: tilebook.attention(q, k, v))
        tilebook.attention(q, k, v)
        if answered() != 1:
            pytest.skip("no verdict has ours ahead on this GPU, or none leaves the call to the host")
        (kind,) = [left for left in dispatch.here.left.values() if left.bounded][:1] or [None]
        if kind is None:
            pytest.skip("it is PyTorch's whatever the host does")
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            o = tilebook.attention(q, k, v)
        assert answered() == 0
        graph.replay()
        torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_a_compiled_program_has_the_graph_it_had():
    x, weight = drawn(16, 1024), drawn(1024)
    with torch.no_grad():
        settled(lambda: tilebook.rms_norm(x, weight))
        compiled = torch.compile(lambda x: tilebook.rms_norm(x * 2, weight), fullgraph=True)
        torch.testing.assert_close(compiled(x), F.rms_norm(x * 2, weight.shape, weight, 1e-6), rtol=2e-2, atol=2e-2)
        tilebook.rms_norm(x, weight)
        assert answered() == 1


def test_a_debugger_sees_the_function():
    x, weight, seen = drawn(16, 1024), drawn(1024), []
    settled(lambda: tilebook.rms_norm(x, weight))
    sys.settrace(lambda frame, *_: seen.append(frame.f_code.co_name))
    try:
        tilebook.rms_norm(x, weight)
    finally:
        sys.settrace(None)
    assert "rms_norm" in seen
    assert answered() == 0


# A bias that learns

LEARNT = {
    "for each": ((2, 2, 64, 64), lambda bias: bias),
    "for all of a batch": ((1, 2, 64, 64), lambda bias: bias),
    "for all rows": ((2, 1, 1, 64), lambda bias: bias),
    "expanded": ((1, 1, 64, 64), lambda bias: bias.expand(2, 2, 64, 64)),
    "by heads": ((1, 64, 64, 2), lambda bias: bias.permute(0, 3, 1, 2)),
    "in fp32": ((1, 2, 64, 64), lambda bias: bias),
}
"""Name → the shape in memory, and a bias of it."""


def learning(name, dtype=torch.bfloat16):
    """q, k, v and a bias, under which row 5 sees nothing where rows differ.

    Kernels of the gradients do not cut 64 keys into pieces, whose sums would come in any order.
    """
    shape, made = LEARNT[name]
    bias = drawn(*shape, seed=3, dtype=torch.float32 if name == "in fp32" else dtype)
    if shape[-2 if name != "by heads" else 1] > 1:
        bias[(slice(None), 5) if name == "by heads" else (..., 5, slice(None))] = -torch.inf
    given = [drawn(2, 2, 64, 64, seed=seed, dtype=dtype) for seed in range(3)]
    return [x.detach().requires_grad_() for x in (*given, made(bias))]


def kernels(step):
    """What a step gives, and the names of the kernels that it runs, in order."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = step()
        torch.cuda.synchronize()
    events = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    return found, [each.name for each in sorted(events, key=lambda each: each.time_range.start)]


@pytest.fixture
def pythons():
    """The same step with all gates shut."""

    def shut(step):
        extension = gates._gates._extension
        extension.gates_ask(True)
        try:
            return kernels(step)
        finally:
            extension.gates_ask(False)

    return shut


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LEARNT)
def test_a_bias_that_learns_has_pythons_bits_by_pythons_kernels(name, dtype, pythons):
    leaves = learning(name, dtype)
    do = drawn(2, 2, 64, 64, seed=9, dtype=dtype)

    def step():
        o = tilebook.attention(*leaves[:3], bias=leaves[3])
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    settled(step)
    found, mine = kernels(step)
    assert answered() == 1
    expected, theirs = pythons(step)
    assert answered() == 0
    assert mine == theirs
    assert [sum(kind in each for each in mine) for kind in ("fmha_cutlassF", "fmha_cutlassB")] == [1, 1], mine
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [x.dtype for x in found[1:]] == [x.dtype for x in leaves]
    assert all(x.isfinite().all() for x in found)
    if leaves[3].shape[2] > 1:
        assert not found[0][:, :, 5].any()
        assert not found[1][:, :, 5].any()


@pytest.mark.parametrize("asked", [(0,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_gradients_of_some_beside_a_bias_that_learns_are_those_of_all(asked, pythons):
    leaves = learning("for all of a batch")

    def step(asked=asked):
        o = tilebook.attention(*leaves[:3], bias=leaves[3])
        return torch.autograd.grad(o.float().square().sum(), [leaves[i] for i in asked])

    settled(step)
    found, _ = kernels(step)
    assert answered() == 1
    expected, _ = pythons(lambda: step(range(4)))
    torch.testing.assert_close(found, tuple(expected[i] for i in asked), rtol=0, atol=0)


def test_a_bias_that_learns_is_looked_at_where_other_kernels_are_asked_for():
    leaves = learning("for all of a batch")

    def step():
        o = tilebook.attention(*leaves[:3], bias=leaves[3])
        return [o.detach(), *torch.autograd.grad(o.float().square().sum(), leaves)]

    settled(step)
    expected = step()
    assert answered() == 1
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = step()
    assert answered() == 0
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
    step()
    assert answered() == 1


def test_gradients_of_gradients_beside_a_bias_that_learns_are_refused():
    leaves = learning("for all of a batch")
    settled(lambda: tilebook.attention(*leaves[:3], bias=leaves[3]))
    o = tilebook.attention(*leaves[:3], bias=leaves[3])
    assert answered() == 1
    (first,) = torch.autograd.grad(o.sum(), leaves[3], create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        first.float().sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_a_bias_that_learns_nothing_now_is_pytorchs_own_call(context):
    leaves = learning("for all of a batch")
    with context():
        settled(lambda: tilebook.attention(*leaves[:3], bias=leaves[3]))
        found = tilebook.attention(*leaves[:3], bias=leaves[3])
        assert answered() == 1
        torch.testing.assert_close(found, F.scaled_dot_product_attention(*leaves), rtol=0, atol=0)
