import math

import pytest
import torch
import torch.nn.functional as F
from drawing import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import TensorHandle

import tilebook
from tilebook import device as devices
from tilebook import dispatch, op
from tilebook.kernels.cross_entropy import problem as posing
from tilebook.kernels.cross_entropy.problem import MOST_ELEMENTS, by_rows
from tilebook.tuner.judge.verify import Case, verify

OPS = [op.get(name) for name in ("cross_entropy_fwd", "cross_entropy_bwd")]
FWD, BWD = OPS
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves")

CONFIGS = [
    op.Config(ROWS=1, BLOCK=16384, num_warps=8),  # a whole row at a time, whatever its width
    op.Config(ROWS=1, BLOCK=1024, num_warps=4),  # rows wider than 1024 in pieces
    op.Config(ROWS=16, BLOCK=2048, num_warps=1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Of what rounding to a dtype, and arithmetic in fp32, may change, relative to the largest number."""


def with_stages(each, config, stages=2):
    return config.replace(STAGES=stages) if each is FWD else config


def drawn(shape, dtype=torch.float32, seed=0, ignored=True):
    """Logits that ask for a gradient, and targets, of which one is ignored where there are several."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(shape[-1], shape[:1], generator=generator)
    if ignored and shape[0] > 1:
        target[1] = -100
    return x, target


def exact(x, target, *, softcap=0.0, z_loss=0.0, reduction="mean", **options):
    """What PyTorch makes of it in fp64."""
    wide = x.double()
    if softcap:
        wide = softcap * torch.tanh(wide / softcap)
    loss = F.cross_entropy(wide, target, reduction="none", **options)
    counted = target != options.get("ignore_index", -100)
    loss = loss + torch.where(counted, z_loss * wide.logsumexp(1).square(), 0.0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / counted.sum()}[reduction]


def gradient(function, x, target, dy=None, **options):
    loss = function(x, target, **options)
    dy = torch.ones_like(loss) if dy is None else dy.to(loss.dtype)
    return loss, torch.autograd.grad(loss, x, dy)[0]


def ours(*args, config=None, **options):
    with dispatch.use("triton", config):
        return gradient(tilebook.cross_entropy, *args, **options)


def assert_near(found, right, dtype):
    for name, mine, truth in zip(("loss", "gradient"), found, right, strict=True):
        assert mine.shape == truth.shape
        assert mine.dtype == dtype
        size = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
        torch.testing.assert_close(
            mine.double(), truth.double(), rtol=STEPS[dtype], atol=STEPS[dtype] * size + 2e-7, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.sampled(4)
@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_other_configs_are_right_too(each, config):
    for problem in each.problem.examples():
        verify(each.tunable, with_stages(each, config), [Case.make(each, problem, "cpu", 1)], repeats=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gpu", devices.CATALOGUE.values(), ids=lambda gpu: gpu.name)
def test_every_number_of_classes_has_a_default_and_a_space(gpu):
    for each in OPS:
        space = each.tunable.space
        for classes in (1, 24, 1000, 4096, 50257, 256000):
            for options in ("", ",smoothed", ",capped", ",smoothed,capped"):
                problem = each.problem.parse(f"M8192,V{classes}{options}", "bf16")
                assert space.reject(problem, space.default(problem, gpu), gpu) is None
                assert 2 <= len(space.feasible(problem, gpu)) <= 64


def test_one_verdict_serves_a_bucket_of_rows_and_one_kernel():
    x, target = torch.zeros(1000, 64), torch.zeros(1000, dtype=torch.int64)
    assert FWD.problem.of(x, target, 0.0, -100, 0.0, 0.0).label == "M1024,V64"
    assert FWD.problem.of(x, target, 0.0, 7, 0.0, 1e-4).label == "M1024,V64"
    assert FWD.problem.of(x, target, 0.1, -100, 0.0, 0.0).label == "M1024,V64,smoothed"
    assert FWD.problem.of(x, target, 0.0, -100, 30.0, 0.0).label == "M1024,V64,capped"


@pytest.mark.parametrize("each", OPS, ids=lambda each: each.name)
def test_what_is_tuned_and_its_neighbours_fit_into_memory(each):
    for problem in each.problem.suites()["models"]:
        assert problem.rows * problem.classes <= MOST_ELEMENTS
        for near in problem.neighbours():
            assert near.rows * near.classes <= max(1 << 26, 2 * near.classes)


def test_a_reference_of_many_rows_is_that_of_each(monkeypatch):
    monkeypatch.setattr(posing, "PIECE", 64)
    x = torch.randn(7, 30)
    torch.testing.assert_close(by_rows(lambda x: x.amax(1), x), x.amax(1))


@pytest.mark.sampled(3)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [None, *CONFIGS[:2]], ids=["default", "whole", "in pieces"])
@pytest.mark.parametrize("classes", [1, 7, 100, 1000, 1500, 4097])
def test_loss_and_gradient_are_right_at_any_width(classes, config, dtype):
    x, target = drawn((5, classes), dtype)
    config = config and config.replace(STAGES=2)
    with dispatch.use("triton", config):
        loss = tilebook.cross_entropy(x, target)
        with dispatch.use("triton", config and op.Config({k: v for k, v in config.items() if k != "STAGES"})):
            found = loss, torch.autograd.grad(loss, x)[0]
    assert_near(found, gradient(exact, x, target), dtype)


@pytest.mark.sampled(2)
@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.3},
        {"label_smoothing": 1.0},
        {"softcap": 2.0},
        {"z_loss": 0.1},
        {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.3},
        {"ignore_index": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [21, 2500])
def test_options_do_what_their_formulas_say(classes, options, reduction, dtype):
    x, target = drawn((6, classes), dtype, ignored="ignore_index" not in options)
    if "ignore_index" in options:
        target[2] = target[5] = 3
    dy = torch.randn(6 if reduction == "none" else (), generator=torch.Generator().manual_seed(7)).to(dtype)
    found = ours(x, target, dy, reduction=reduction, **options)
    assert_near(found, gradient(exact, x, target, dy, reduction=reduction, **options), dtype)


@interpreted
@pytest.mark.parametrize("classes", [50, 3001])
def test_ignored_rows_are_not_read(classes):
    x, target = drawn((4, classes), ignored=False)
    target[2] = -100
    with torch.no_grad():
        x[2] = math.nan
    loss, dx = ours(x, target, reduction="none")
    assert loss[2] == 0
    assert not dx[2].any()
    others = [0, 1, 3]
    right = gradient(exact, x.detach()[others].requires_grad_(), target[others], reduction="none")
    assert_near((loss[others], dx[others]), right, torch.float32)


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_all_rows_are_ignored_it_is_what_pytorch_makes_of_it(reduction):
    x, target = drawn((3, 40))[0], torch.full((3,), -100)
    right = F.cross_entropy(x, target, reduction=reduction)
    loss, dx = ours(x, target, reduction=reduction)
    torch.testing.assert_close(loss, right, equal_nan=True, rtol=0, atol=0)
    assert not dx.any()


@interpreted
@pytest.mark.parametrize("classes", [60, 2048, 4100])
@pytest.mark.parametrize("masked", ["some", "the first block", "the target", "all but one", "all"])
def test_classes_that_are_masked_by_minus_infinity_are_right(masked, classes):
    x, target = drawn((3, classes), ignored=False)
    target[:] = classes - 2
    with torch.no_grad():
        x[:, 1::2] = -math.inf
        if masked == "the first block":
            x[0, :1100] = -math.inf
            x[0, -2] = 0.5
        elif masked == "the target":
            x[0, -2] = -math.inf
        elif masked != "some":
            x[0] = -math.inf
            if masked == "all but one":
                x[0, -2] = 1.0
    pieces = op.Config(ROWS=1, BLOCK=1024, num_warps=4)
    for config in (None, pieces.replace(STAGES=1)):
        with dispatch.use("triton", config):
            loss = tilebook.cross_entropy(x, target, reduction="none")
            with dispatch.use("triton", config and pieces):
                found = loss, torch.autograd.grad(loss.sum(), x)[0]
        assert_near(found, gradient(exact, x, target, reduction="none"), torch.float32)


@interpreted
@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_rows_that_are_masked_by_the_lowest_number_are_right(low):
    x, target = drawn((3, 2048), torch.float32 if low < -3.4e38 else torch.bfloat16, ignored=False)
    with torch.no_grad():
        x[0], x[1, 5:] = low, low
        target[1] = 3
    loss, dx = ours(x, target, reduction="none")
    right, wanted = gradient(exact, x, target, reduction="none")
    torch.testing.assert_close(loss.double(), right, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dx.double()[1:], wanted.double()[1:], rtol=1e-2, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.bfloat16, 1e4), (torch.float16, 3e4)])
def test_large_logits_do_not_overflow(dtype, size):
    x, target = drawn((4, 3000), dtype)
    with torch.no_grad():
        x.mul_(size / 4)
        x[0, target[0]] += size / 2
    loss, dx = ours(x, target, reduction="none")
    right, wanted = gradient(exact, x, target, reduction="none")
    torch.testing.assert_close(loss.double(), right, rtol=STEPS[dtype], atol=2e-3)
    torch.testing.assert_close(dx.double(), wanted.double(), rtol=0, atol=max(STEPS[dtype], size * 2**-23))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("classes", [48, 1040, 1041])
def test_logits_are_taken_with_their_strides(classes, dtype):
    wide, target = drawn((12, classes + 16), dtype)
    target = target.clamp(max=classes - 1)
    layouts = {
        "columns cut off": wide[:, :classes],
        "columns cut off in front": wide[:, 3 : classes + 3],
        "every other row": wide[::2, :classes],
        "turned": wide[:, :classes].t().contiguous().t(),
        "one row for all": wide[:1, :classes].expand(12, classes),
    }
    for name, x in layouts.items():
        x, labels = x.detach().requires_grad_(), target[: len(x)]
        assert_near(ours(x, labels), gradient(exact, x, labels), dtype), name


@interpreted
@pytest.mark.parametrize("classes", [7, 1000, 1041, 2001])
def test_what_is_loaded_and_stored_as_whole_vectors_lies_so(monkeypatch, classes):
    def check(handle, name, values):
        seen.append(name)
        assert not (handle.data % values[0]).any()

    seen = []
    monkeypatch.setattr(TensorHandle, "set_attr", check)
    for dtype in DTYPES[:2]:
        x, target = drawn((12, classes + 3), dtype)
        for cut in (x[:, 3:], x):
            cut = cut.detach().requires_grad_()
            labels = target.clamp(max=classes - 1)
            with dispatch.use("triton", CONFIGS[1].replace(STAGES=1)):
                loss = tilebook.cross_entropy(cut, labels)
                with dispatch.use("triton", CONFIGS[1]):
                    found = loss, torch.autograd.grad(loss, cut)[0]
            assert_near(found, gradient(exact, cut, labels), dtype)
    assert len(seen) >= 2 * 2 * 2 * 12  # dtypes, cuts, kernels, rows


@interpreted
def test_targets_are_taken_with_their_strides():
    x, target = drawn((12, 40))
    strided = torch.stack((target, target + 1), 1)[:, 0]
    assert_near(ours(x, strided), gradient(exact, x, target), torch.float32)


@interpreted
def test_rows_that_lie_far_apart_are_found():
    step = 1 << 30
    x = torch.empty((3 * step,), dtype=torch.bfloat16).as_strided((3, 300), (step, 1))
    x.copy_(drawn((3, 300), torch.bfloat16)[0].detach())
    target = torch.tensor([3, 299, 17])
    x.requires_grad_()
    for config in CONFIGS[1:]:
        with dispatch.use("triton", config.replace(STAGES=1)):
            loss = tilebook.cross_entropy(x, target)
            with dispatch.use("triton", config):
                found = loss, torch.autograd.grad(loss, x)[0]
        near = x.detach().contiguous().requires_grad_()
        assert_near(found, gradient(exact, near, target), torch.bfloat16)


@interpreted
@pytest.mark.parametrize("classes", [40, 2000])
@pytest.mark.parametrize("label", [-1, 1 << 20, 1 << 40, -(1 << 40)])
def test_a_target_that_is_no_class_is_not_read_and_has_nan(classes, label):
    x, target = drawn((3, classes), ignored=False)
    target[1] = classes if label == 1 << 20 else label
    loss, dx = ours(x, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert dx.isnan().any(1).tolist() == [False, True, False]
    assert dx[1].isnan().all()


@interpreted
@settings(max_examples=examples(60), deadline=None)
@given(
    rows=st.integers(1, 9), classes=st.integers(1, 1200), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
    smoothing=st.sampled_from([0.0, 0.1]), cut=st.integers(0, 17), reduction=st.sampled_from(["mean", "sum", "none"]),
)  # fmt: skip
def test_any_shape_is_right(rows, classes, dtype, seed, smoothing, cut, reduction):
    x, target = drawn((rows, classes + cut), dtype, seed)
    x, target = x.detach()[:, cut:].requires_grad_(), torch.where(target < 0, target, target % classes)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    assert_near(ours(x, target, **options), gradient(exact, x, target, **options), dtype)


@interpreted
def test_gradients_repeat_bit_for_bit_and_differentiate_again():
    x, target = drawn((6, 24))
    first, second = (ours(x, target)[1] for _ in range(2))
    assert torch.equal(first, second)
    with dispatch.use("triton"):
        (once,) = torch.autograd.grad(tilebook.cross_entropy(x, target, z_loss=0.1), x, create_graph=True)
        (twice,) = torch.autograd.grad(once.square().sum(), x)
    (once,) = torch.autograd.grad(exact(x, target, z_loss=0.1), x, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(once.square().sum(), x)[0])
