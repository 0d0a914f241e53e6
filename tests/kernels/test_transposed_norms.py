"""Norms of tensors whose rows are side by side in memory, as a convolution leaves tokens: read where they lie."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import device as devices
from tilebook import dispatch, replay
from tilebook import op as ops
from tilebook.kernels.norms import entry, launch
from tilebook.kernels.norms.standing import STANDINGS
from tilebook.launch import intercepted
from tilebook.layout import transposed
from tilebook.tuner.judge.verify import Case, error, floors, verify

OPS = [ops.get(f"{norm}_{way}") for norm in ("layer_norm", "rms_norm") for way in ("fwd", "bwd")]
LAYER, LAYER_BWD = OPS[:2]
H200 = devices.find("H200")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

LAID = {
    "tokens of a convolution": ((3, 24, 4, 5), lambda x: x.flatten(2).transpose(1, 2)),
    "channels last": ((2, 24, 3, 7), lambda x: x.permute(0, 2, 3, 1)),
    "first axis last": ((24, 3, 4), lambda x: x.permute(1, 2, 0)),
    "a matrix": ((24, 40), lambda x: x.t()),
    "five axes": ((2, 2, 24, 3, 4), lambda x: x.permute(0, 1, 3, 4, 2)),
}
OTHERWISE = {
    "contiguous": lambda x: x,
    "cut out": lambda x: x[:, 1:, 2:9],
    "cut out and turned": lambda x: x[:, :, 1:].transpose(1, 2),
    "axes in another order": lambda x: x[None].permute(0, 3, 1, 2),
    "expanded": lambda x: x[:1].transpose(1, 2).expand(3, -1, -1),
    "one row": lambda x: x[:, :, :1].transpose(1, 2),
    "one column": lambda x: x[:, :1].transpose(1, 2),
    "nothing": lambda x: x[:0].transpose(1, 2),
}


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", LAID)
def test_a_tensor_that_lies_so_is_a_view_of_batches(name):
    shape, laid = LAID[name]
    x = laid(drawn(*shape))
    found = transposed(x)
    assert found.data_ptr() == x.data_ptr()
    assert found.ndim == 3
    assert found.stride()[1:] == (1, found.shape[1])
    assert torch.equal(found.reshape(-1, 24), x.reshape(-1, 24))


@pytest.mark.parametrize("name", OTHERWISE)
def test_one_that_lies_otherwise_is_none(name):
    assert transposed(OTHERWISE[name](drawn(3, 10, 12))) is None


def test_the_problem_of_a_call_says_how_x_lies():
    x, vectors = drawn(2, 24, 20).mT, (drawn(24), drawn(24))
    assert LAYER.problem.of(x, *vectors, 1e-5).label == "M64,N24,transposed20"
    assert LAYER.problem.of(x.contiguous(), *vectors, 1e-5).label == "M64,N24"
    backward = LAYER_BWD.problem.of(drawn(40, 24), x, *vectors, drawn(40), drawn(40))
    assert backward.label == "M64,N24,transposed20"
    assert backward.distance(LAYER_BWD.problem.parse("M64,N24", "fp32")) == float("inf")
    with pytest.raises(ops.UsageError):
        LAYER.problem.parse("M64,N24,transposed1", "fp32")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_every_width_has_a_default_and_a_space(op, gpu):
    space = op.tunable.space
    for text in ("N24,transposed4", "N384,transposed196", "N1024,transposed1025", "N4096,transposed49"):
        for dtype in ("fp32", "bf16"):
            problem = op.problem.parse(f"M8192,{text}", dtype)
            assert space.reject(problem, space.default(problem, gpu), gpu) is None
            feasible = space.feasible(problem, gpu)
            assert len(feasible) >= (1 if problem.width == 24 else 5)
            assert min(config.number("ROWS") for config in feasible) == 8
    assert all(config.number("ROWS") <= 16 for config in space.feasible(op.problem.parse("M8192,N24", "fp32"), gpu))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_neighbours_have_the_same_unit_and_lie_so_too(op):
    for text in ("M32768,N384,transposed196", "M7,N24,transposed7"):
        problem = op.problem.parse(text, "bf16")
        near = problem.neighbours()
        assert len(near) >= 3
        assert {math.gcd(each.beside, 8) for each in near} == {math.gcd(problem.beside, 8)}


@pytest.mark.parametrize("op", ops.families()["add_rms_norm"] + OPS, ids=lambda op: op.name)
def test_calls_can_be_repeated_without_the_launcher(op):
    problem = op.problem.parse("M40,N100,transposed20" if op.problem.TURNED else "M40,N100", "fp32")
    args, config = problem.inputs("meta", 0), op.tunable.space.default(problem, H200)
    with devices.posing_as(H200), replay._Watch() as watch, intercepted(lambda *_: None):
        op.tunable(*args, config=config)
    assert watch.faithful


@pytest.mark.sampled(6)
@interpreted
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize(("rows", "block", "warps"), [(8, 1024, 2), (32, 1024, 8), (16, 2048, 4)])
def test_other_configs_are_right_too(op, rows, block, warps):
    config = ops.Config(ROWS=rows, BLOCK=block, num_warps=warps)
    if op.direction == "bwd":
        config = config.replace(PER_SM=1)
    for text in ("M40,N1100,transposed20", "M66,N24,transposed33", "M16,N136,unbiased,transposed2"):
        for dtype in ("fp32", "bf16"):
            verify(op.tunable, config, [Case.make(op, op.problem.parse(text, dtype), "cpu", 1)], repeats=0)


def step(norm, x, vectors, dy):
    y = norm(x, *vectors)
    return y, *torch.autograd.grad(y, [x, *vectors], dy)


def norms(name):
    if name == "layer_norm":
        return tilebook.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), 2
    return tilebook.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), 1


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("laid", LAID)
def test_a_call_and_its_gradients_are_pytorchs_without_a_copy(laid, name, dtype, monkeypatch):
    started, start = [], launch.launch

    def watched(kernel, grid, *args, **meta):
        started.append((kernel, args, meta))
        start(kernel, grid, *args, **meta)

    monkeypatch.setattr(launch, "launch", watched)
    (shape, lay), (ours, theirs, count) = LAID[laid], norms(name)
    x = lay(drawn(*shape, dtype=dtype)).requires_grad_()
    vectors = [drawn(24, seed=seed, dtype=dtype).requires_grad_() for seed in range(1, 1 + count)]
    dy = drawn(*x.shape, seed=5, dtype=dtype)
    with dispatch.use("triton"):
        found = step(ours, x, vectors, dy)
    for _, args, meta in started[:2]:
        assert meta["UNIT"]
        assert x.data_ptr() in [each.data_ptr() for each in args if isinstance(each, torch.Tensor)]
    pytorch = step(theirs, x, vectors, dy)
    wide = [each.detach().double().requires_grad_() for each in (x, *vectors)]
    truth = step(theirs, wide[0], wide[1:], dy.double())
    assert found[0].is_contiguous()
    for mine, other, right in zip(found, pytorch, truth, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        floor, seen, allowed = floors(right.float(), dtype, dtype), error(mine, right), error(other, right)
        assert seen.max <= 2 * allowed.max + floor.max
        assert seen.rms <= 2 * allowed.rms + floor.rms


@interpreted
def test_gradients_of_other_layouts_twice_and_out_of_hooks_are_the_same():
    x, vectors = drawn(3, 24, 20).mT.requires_grad_(), [drawn(24, seed=1).requires_grad_()]
    dy = drawn(3, 24, 20, seed=2).mT
    with dispatch.use("triton"):
        right = step(tilebook.rms_norm, x, vectors, dy.contiguous())
        found = [step(tilebook.rms_norm, x, vectors, dy)]
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.contiguous(), lambda saved: saved):
            found.append(step(tilebook.rms_norm, x, vectors, dy))
        (dx,) = torch.autograd.grad(tilebook.rms_norm(x, *vectors), x, dy, create_graph=True)
        found.append([right[0], dx, right[2]])
        (twice,) = torch.autograd.grad(dx.square().sum(), x)
    for each in found:
        for mine, other in zip(each, right, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(F.rms_norm(x, (24,), *vectors, 1e-6), x, dy, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(dx.square().sum(), x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("source", "served"), [("exact", True), ("forced", True), ("fallback", False)])
def test_x_is_taken_as_it_lies_where_a_verdict_is_on_that(monkeypatch, source, served):
    asked, choice = [], SimpleNamespace(source=source, calls=0)
    monkeypatch.setattr(dispatch, "lookup", lambda op, args: (asked.append(args[1]), choice)[1])
    dy, x = drawn(60, 24), drawn(3, 24, 4, 5).permute(0, 2, 3, 1)
    found = entry.turned(LAYER_BWD, (dy, x, None), 1)
    assert asked[0].stride() == (480, 1, 20)
    if served:
        assert found[0] is dy
        assert found[1] is asked[0]
    assert (found is None, choice.calls) == (not served, int(not served))  # one that is not there is a miss
    assert entry.turned(LAYER_BWD, (dy, x.contiguous(), None), 1) is None
    assert len(asked) == 1


X, DY, W, STATISTIC = drawn(3, 24, 5).mT, drawn(3, 5, 24), drawn(24), drawn(3, 5, 1)
POSED = {
    "aten::native_layer_norm": [X, (24,), W, W, 1e-5],
    "aten::native_layer_norm_backward": [DY, X, (24,), STATISTIC, STATISTIC, W, W, (True, True, True)],
    "aten::_fused_rms_norm": [X, (24,), W, 1e-6],
    "aten::_fused_rms_norm_backward": [DY, X, (24,), STATISTIC, W, (True, True)],
}


@pytest.mark.parametrize("spread", [None, -1, 0], ids=["nothing", "the weight", "the gradient"])
@pytest.mark.parametrize("source", ["exact", "fallback"])
@pytest.mark.parametrize("standing", STANDINGS, ids=lambda standing: standing.name)
def test_below_autograd_x_is_taken_as_it_lies_and_all_else_contiguous(monkeypatch, standing, source, spread):
    args = list(POSED[standing.name])
    at, tensors = args.index((24,)) - 1, [n for n, each in enumerate(args) if isinstance(each, torch.Tensor)]
    one = None
    if spread is not None:
        one = tensors[spread] if tensors[spread] != at else tensors[-1]
        args[one] = torch.stack((args[one], args[one]), -1)[..., 0]
    monkeypatch.setattr(dispatch, "lookup", lambda op, given: SimpleNamespace(source=source, calls=0))
    posed = standing.posed(tuple(args))
    exact = source == "exact"
    loose = [n for n, each in enumerate(posed) if torch.is_tensor(each) and not each.is_contiguous()]
    assert loose == [at] * exact
    assert posed[at].shape == ((3, 5, 24) if exact else (15, 24))
    for mine, theirs in zip(posed, standing.places, strict=True):
        if theirs is not None:
            assert (mine.data_ptr() == args[theirs].data_ptr()) is not (theirs == one or (theirs == at and not exact))


@pytest.mark.parametrize("laid", ["a matrix", "three axes", "tokens of a convolution"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("served", ["torch", "triton"])
def test_what_is_given_may_be_written_into(served, name, laid):
    """By PyTorch's kernels as behind hooks on what is saved, where a call is not left to its function as a whole."""
    made = {"a matrix": torch.randn(6, 24), "three axes": torch.randn(3, 4, 24)}
    shape, lay = LAID["tokens of a convolution"]
    x = made.get(laid, lay(torch.randn(shape))).requires_grad_()
    y = getattr(F, name)(x, x.shape[-1:])
    (right,) = torch.autograd.grad((y + 1).square().sum(), x)
    with dispatch.use(served):
        found = getattr(tilebook, name)(x, None, **({"eps": torch.finfo(x.dtype).eps} if name == "rms_norm" else {}))
    found.add_(1)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x), (right,))
