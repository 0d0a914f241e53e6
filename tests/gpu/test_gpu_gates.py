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
