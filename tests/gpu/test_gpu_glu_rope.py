"""Gated linear units and rotary position embedding on the GPU that is here, at sizes that no interpreter runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from programs.compare import assert_as_near
from programs.hf_models import inputs, made, plain, step

import tilebook
from tilebook import dispatch

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def drawn(*shapes, dtype=BF16, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        (torch.randn(shape, device="cuda", generator=generator) * scale).to(dtype).requires_grad_() for shape in shapes
    ]


def gradients(function, tensors):
    """Results, and gradients of what wants one."""
    ys = function(*tensors)
    ys = ys if isinstance(ys, tuple) else (ys,)
    return [*ys, *torch.autograd.grad([y.float().square().sum() for y in ys], [x for x in tensors if x.requires_grad])]


def doubled(tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def plain_rope(q, k, cos, sin):
    half = cos.shape[-1] // 2
    return tuple(x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))


def angles(length, width, dtype=BF16):
    turn = torch.arange(length, device="cuda")[:, None] * 10000 ** (
        -torch.arange(width // 2, device="cuda") * 2 / width
    )
    turn = torch.cat((turn, turn), -1)[None]
    return turn.cos().to(dtype), turn.sin().to(dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [8192, 11008, 4865])
def test_gates_of_models_are_right(width, dtype):
    tensors = drawn((1000, width), (1000, width), dtype=dtype)
    with dispatch.use("triton"):
        ours = gradients(tilebook.glu, tensors)
    theirs, right = (gradients(lambda g, u: F.silu(g) * u, each) for each in (tensors, doubled(tensors)))
    assert_as_near(ours, theirs, right)


def test_more_numbers_than_32_bits_count_are_right():
    rows, width = 32771, 1 << 16
    assert rows * width > 1 << 31
    gate = torch.ones(rows, width, device="cuda", dtype=BF16)
    gate[-1] = -2.0
    with dispatch.use("triton"):
        h = tilebook.glu(gate, gate)
    for row in (0, rows // 2, rows - 1):
        torch.testing.assert_close(h[row], F.silu(gate[row]) * gate[row], rtol=2**-7, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_layers_of_models_are_right_and_keep_less(packed, recompute):
    m, h, f = 2048, 1024, 4096
    weights = [(2 * f, h)] if packed else [(f, h)] * 2
    x, *rest = drawn((m, h), *weights, (h, f), scale=0.05)
    rest = [rest[0], None, rest[1]] if packed else rest

    def ours(x, *weights):
        given = (weights[0], None, weights[1]) if packed else weights
        return tilebook.swiglu(x, *given, recompute=recompute)

    def theirs(x, *weights):
        wide = F.linear(x, weights[0])
        gate, up = wide.chunk(2, -1) if packed else (wide, F.linear(x, weights[1]))
        return F.linear(F.silu(gate) * up, weights[-1])

    tensors = [x, *[each for each in rest if each is not None]]
    with dispatch.use("triton"):
        found = gradients(ours, tensors)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = ours(*tensors)
        kept = torch.cuda.memory_allocated() - before - y.numel() * 2
    assert kept <= (0 if recompute else 2 * m * f * 2) + (1 << 16)
    assert_as_near(found, gradients(theirs, tensors), gradients(theirs, doubled(tensors)), blur=2.0)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "heads_kv", "length", "width"), [(32, 8, 2048, 64), (28, 4, 1000, 128), (8, 4, 77, 256)]
)
def test_heads_of_models_are_right(heads, heads_kv, length, width, dtype):
    q, k = (x.detach().transpose(1, 2).requires_grad_() for x in drawn(
        (2, length, heads, width), (2, length, heads_kv, width), dtype=dtype
    ))  # fmt: skip
    tensors = [q, k, *angles(length, width, dtype)]
    with dispatch.use("triton"):
        ours = gradients(tilebook.apply_rope, tensors)
    assert ours[0].stride() == q.stride()
    assert_as_near(ours, gradients(plain_rope, tensors), gradients(plain_rope, doubled(tensors)))


def test_a_graph_is_captured_and_replayed():
    gate, up = drawn((512, 2048), (512, 2048))
    q, k = (x.detach().transpose(1, 2).requires_grad_() for x in drawn((1, 128, 8, 64), (1, 128, 2, 64)))

    def both():
        h = gradients(tilebook.glu, [gate, up])
        return [*h, *gradients(tilebook.apply_rope, [q, k, *turn])]

    turn = angles(128, 64)
    with dispatch.use("triton"):
        for _ in range(3):
            both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = both()
        with torch.no_grad():
            gate.mul_(2)
            q.mul_(2)
        graph.replay()
        for mine, right in zip(found, both(), strict=True):
            # A choice that is forced is new at each call, and under capture PyTorch's own serves what is new.
            torch.testing.assert_close(mine, right, rtol=2**-5, atol=2**-5 * right.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_patched_models_are_as_near_to_the_truth_as_pytorchs(name):
    model, given = made(name, attention=plain(name)).cuda(), inputs(name, "whole", "cuda")
    right = step(copy.deepcopy(model).to(torch.float32 if name == "gemma2" else torch.float64), given)
    theirs = step(model.to(BF16), given)
    with tilebook.patched(model) as report, dispatch.use("triton"):
        assert "attention with tilebook.apply_rope" in report.changed.values()
        ours = step(model, given)
    assert_as_near(ours, theirs, right, name, blur=2.0)
