"""Linear attention in which every token sees all, on the GPU that is here."""

import pytest
import torch

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.kernels.bidirectional.form import MAPS
from tilebook.nn.linear import attend
from tilebook.tuner.judge.verify import Case, verify

pytestmark = pytest.mark.gpu

OPS = [op.get(f"bidirectional_linear_attention_{way}") for way in ("fwd", "bwd")]
NAMED = [None if name == "none" else name for name in MAPS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(rows, keys, dtype, *, batch=2, heads=3, width=64, columns=64, positive=False):
    source = torch.Generator("cuda").manual_seed(0)
    shapes = (rows, width), (keys, width), (keys, columns)
    q, k, v = (torch.randn(batch, heads, *shape, generator=source, device="cuda").to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in ((q.abs(), k.abs(), v) if positive else (q, k, v))]


def gradients(tensors, hidden, feature_map, do):
    o = attend(*tensors, hidden, feature_map=feature_map, causal=False, eps=1e-6)
    return [o, *torch.autograd.grad(o, tensors, do.to(o.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", NAMED)
@pytest.mark.parametrize(
    ("rows", "keys", "width", "columns"),
    [(256, 256, 64, 64), (1, 1000, 64, 32), (2500, 333, 128, 128), (100, 70, 40, 72)],
)
def test_errors_are_at_most_twice_those_of_plain_pytorch(rows, keys, width, columns, feature_map, dtype):
    tensors = drawn(rows, keys, dtype, width=width, columns=columns, positive=feature_map is None)
    hidden = torch.rand(2, keys, device="cuda") > 0.7
    hidden[:, 0] = False
    do = torch.randn(2, 3, rows, columns, device="cuda").to(dtype)
    with dispatch.use("triton"):
        mine = gradients(tensors, hidden, feature_map, do)
    with dispatch.use("torch"):
        theirs = gradients(tensors, hidden, feature_map, do)
    wide = [x.detach().double().cpu().requires_grad_() for x in tensors]
    truth = gradients(wide, hidden.cpu(), feature_map, do.double().cpu())
    step, least = torch.finfo(dtype).eps, 0.05 * max(x.abs().max().item() for x in truth)
    for at, (its, other, right) in enumerate(zip(mine, theirs, truth, strict=True)):
        errors = [(x.double().cpu() - right).square().mean().sqrt().item() for x in (its, other)]
        assert errors[0] <= 2 * errors[1] + step * (right.square().mean().sqrt().item() + least), at


@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
@pytest.mark.parametrize(
    "shape", ["B4,H6,S256,D64,performer,padded", "B2,H3,S1000,K700,D64", "B2,H2,S500,D128,softmax"]
)
def test_feasible_configs_are_right(each, shape):
    problem, gpu = each.problem.parse(shape, "bf16"), devices.current()
    space = each.tunable.space
    feasible = space.feasible(problem, gpu)
    cases, tried = [Case.make(each, problem, "cuda", 1)], 0
    for config in feasible[:: max(1, len(feasible) // 10)]:
        try:
            verify(each.tunable, config, cases, repeats=1)
        except Exception as broken:
            assert type(broken).__name__ == "OutOfResources", (config, broken)  # noqa: PT017
            continue
        tried += 1
    assert tried > 4


def test_results_repeat_bit_for_bit():
    tensors = drawn(512, 512, torch.bfloat16, batch=16, heads=12)
    do = torch.randn_like(tensors[2])
    with dispatch.use("triton"):
        first, second = (gradients(tensors, None, "performer", do) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_compiled_and_eager_are_the_same():
    tensors = drawn(500, 500, torch.bfloat16)
    compiled = torch.compile(
        lambda q, k, v: tilebook.linear_attention(q, k, v, feature_map="performer"), fullgraph=True
    )
    found = [compiled(*tensors)]
    found += torch.autograd.grad(found[0].float().square().sum(), tensors)
    for mine, right in zip(found, forward_and_gradients(tensors), strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2)


def forward_and_gradients(tensors):
    o = tilebook.linear_attention(*tensors, feature_map="performer")
    return [o, *torch.autograd.grad(o.float().square().sum(), tensors)]


def test_a_graph_is_captured_and_replayed():
    q, k, v = (x.detach() for x in drawn(256, 256, torch.bfloat16))
    with torch.no_grad():
        for _ in range(3):
            tilebook.linear_attention(q, k, v, feature_map="performer")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = tilebook.linear_attention(q, k, v, feature_map="performer")
        q.copy_(torch.randn_like(q))
        graph.replay()
        right = tilebook.linear_attention(q, k, v, feature_map="performer")
    assert torch.equal(o, right)


def test_training_keeps_no_features():
    tensors = drawn(4096, 4096, torch.bfloat16, heads=8)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with dispatch.use("triton"):
        o = tilebook.linear_attention(*tensors, feature_map="performer")
    kept = torch.cuda.memory_allocated() - before
    assert kept < 1.2 * o.numel() * o.element_size()
