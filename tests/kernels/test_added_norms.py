"""Norms of a sum that is a result, too."""

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import dispatch
from tilebook import op as ops
from tilebook.kernels.norms import launch
from tilebook.tuner.judge.verify import Case, error, floors, verify

OPS = [ops.get(f"add_{norm}_{way}") for norm in ("layer_norm", "rms_norm") for way in ("fwd", "bwd")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

CONFIGS = [
    ops.Config(ROWS=1, BLOCK=65536, num_warps=4),  # a whole row at a time, whatever its width
    ops.Config(ROWS=4, BLOCK=1024, num_warps=8),  # rows wider than 1024 in pieces
]


def layer(x, residual, *vectors):
    h = x + residual
    return F.layer_norm(h, h.shape[-1:], *vectors), h


def rms(x, residual, *vectors):
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], *vectors, eps=1e-6), h


NORMS = {
    "layer_norm": (tilebook.add_layer_norm, layer, 2),
    "unbiased": (tilebook.add_layer_norm, layer, 1),
    "bare": (tilebook.add_layer_norm, layer, 0),
    "rms_norm": (tilebook.add_rms_norm, rms, 1),
}
each_norm = pytest.mark.parametrize("name", NORMS)


def leaves(shape, vectors, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape] * 2 + [shape[-1:]] * vectors
    return [torch.randn(each, generator=generator).to(dtype).requires_grad_() for each in shapes]


def step(norm, tensors, which=(0, 1)):
    """The results and all gradients by those of some results."""
    generator = torch.Generator().manual_seed(1)
    results = norm(*tensors)
    dys = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]
    given = [results[each] for each in which], tensors, [dys[each] for each in which]
    return *results, *torch.autograd.grad(*given, allow_unused=True)


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_other_configs_are_right_too(each, config):
    if each.direction == "bwd":
        config = config.replace(PER_SM=1)
    for problem in each.problem.examples():
        verify(each.tunable, config, [Case.make(each, problem, "cpu", 1)], repeats=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 100), (7, 1500), (40,)], ids=str)
@each_norm
def test_results_and_gradients_err_at_most_twice_as_much_as_pytorchs_two_calls(name, shape, dtype):
    ours, theirs, vectors = NORMS[name]
    tensors = leaves(shape, vectors, dtype)
    with dispatch.use("triton"):
        found = step(ours, tensors)
    truth = step(theirs, [each.detach().double().requires_grad_() for each in tensors])
    for mine, other, right in zip(found, step(theirs, tensors), truth, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        floor, seen, allowed = floors(right.float(), dtype, dtype), error(mine, right), error(other, right)
        assert seen.max <= 2 * allowed.max + floor.max
        assert seen.rms <= 2 * allowed.rms + floor.rms
    assert torch.equal(found[1], tensors[0] + tensors[1])  # rounded as PyTorch rounds it
    assert torch.equal(found[2], found[3])


@interpreted
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=["default", "whole rows", "in pieces"])
def test_the_sum_is_rounded_before_it_is_normalised(config):
    x, residual, weight = (each.detach() for each in leaves((9, 1500), 1, torch.bfloat16))
    with dispatch.use("triton", config):
        y, h = tilebook.add_rms_norm(x, residual, weight)
        assert torch.equal(y, tilebook.rms_norm(h, weight))


@interpreted
@pytest.mark.parametrize("way", ["direct", "op"])
@pytest.mark.parametrize("which", [(0,), (1,)], ids=["of y alone", "of h alone"])
@each_norm
def test_a_result_that_nobody_uses_has_no_gradient(name, which, way, monkeypatch):
    ours, theirs, vectors = NORMS[name]
    tensors = leaves((5, 24), vectors)
    if way == "op":
        monkeypatch.setattr("tilebook.kernels.norms.way", lambda *_, **__: "op")
    with dispatch.use("triton"):
        found = step(ours, tensors, which)
    for mine, right in zip(found, step(theirs, tensors, which), strict=True):
        right = torch.zeros_like(mine) if right is None and mine is not None else right
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


@interpreted
def test_one_pass_reads_and_writes_all_and_keeps_the_sum_alone(monkeypatch):
    started, start, kept = [], launch.launch, []

    def watched(kernel, grid, *args, **meta):
        started.append(kernel.fn.__name__)
        start(kernel, grid, *args, **meta)

    monkeypatch.setattr(launch, "launch", watched)
    tensors = leaves((5, 24), 1)
    with dispatch.use("triton"):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x):
            y, h = tilebook.add_rms_norm(*tensors)
        torch.autograd.grad((y, h), tensors, (torch.ones_like(y), torch.ones_like(h)))
    assert started == ["fwd_kernel", "bwd_kernel", "sum_kernel"]
    assert kept == [(5, 24), (24,), (5,)]


@interpreted
def test_a_frozen_addend_and_one_given_twice():
    x, residual, weight = leaves((5, 24), 1)
    for given, wanted in (((x, residual.detach(), weight), (x, weight)), ((x, x, weight), (x, weight))):
        y, h = rms(*given)
        right = torch.autograd.grad((y * h).sum(), wanted)
        with dispatch.use("triton"):
            y, h = tilebook.add_rms_norm(*given)
            found = torch.autograd.grad((y * h).sum(), wanted)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_norm
def test_on_the_cpu_it_is_pytorch_bit_for_bit(name, dtype):
    ours, theirs, vectors = NORMS[name]
    tensors = leaves((2, 3, 16), vectors, dtype)
    for mine, right in zip(step(ours, tensors), step(theirs, tensors), strict=True):
        assert torch.equal(mine, right)


@interpreted
def test_a_residual_of_another_dtype_is_pytorchs_two_calls():
    x, residual, weight = leaves((5, 24), 1)
    with dispatch.use("triton"):
        y, h = tilebook.add_rms_norm(x.bfloat16(), residual, weight)
    assert y.dtype == h.dtype == torch.float32
    assert torch.equal(y, rms(x.bfloat16(), residual, weight)[0])


def test_problems_have_no_transposed_form_and_empty_stays_empty():
    with pytest.raises(ops.UsageError, match="contiguous rows"):
        OPS[0].problem.parse("M64,N24,transposed8", "fp32")
    with dispatch.use("triton"):
        assert [each.shape for each in tilebook.add_rms_norm(torch.zeros(0, 8), torch.zeros(0, 8))] == [(0, 8)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(3, 7)}, r"not torch.float32 \(3, 7\) on cpu beside torch.float32 \(3, 8\) on cpu"),
        ({"residual": torch.zeros(3, 8, device="meta")}, "expected a residual like x"),
        ({"residual": torch.zeros(3, 8, dtype=torch.int64)}, "expected a residual like x"),
        ({"residual": 1.0}, "expected a tensor"),
        ({"weight": torch.zeros(7)}, r"and weight \(N,\), not \(3, 8\) and \(7,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("function", [tilebook.add_rms_norm, tilebook.add_layer_norm])
def test_bad_inputs_are_named(function, change, message):
    arguments = {"x": torch.zeros(3, 8), "residual": torch.zeros(3, 8), "weight": torch.zeros(8)} | change
    with pytest.raises(ValueError, match=message):
        function(**arguments)
