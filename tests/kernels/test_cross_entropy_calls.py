"""Calls of cross_entropy: what goes to PyTorch, what more axes and options are, what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import DTYPES, drawn, exact, gradient, interpreted, ours

import tilebook


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 6, 2), (2, 6, 3, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"reduction": "none"}, {"ignore_index": 0}], ids=str)
def test_on_the_cpu_it_is_pytorch_bit_for_bit(shape, dtype, options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    target = torch.randint(6, shape[:1] + shape[2:], generator=generator) if len(shape) > 1 else torch.tensor(4)
    found = (gradient(function, x, target, **options) for function in (tilebook.cross_entropy, F.cross_entropy))
    for mine, right in zip(*found, strict=True):
        assert torch.equal(mine, right)
        assert right.isfinite().all()


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("shape", "own"), [((2, 5, 30), True), ((2, 3, 4, 30), True), ((2, 30, 5), False), ((1, 30, 5), False)], ids=str
)
def test_more_axes_are_served_where_the_classes_are_contiguous(monkeypatch, shape, own, reduction):
    x = torch.randn(shape)
    x = (x.movedim(-1, 1) if own else x).requires_grad_()
    target = torch.randint(30, x.shape[:1] + x.shape[2:])
    target.view(-1)[3] = -100
    right = gradient(F.cross_entropy, x, target, reduction=reduction)
    other = "pytorch.cross_entropy" if own else "registered"
    monkeypatch.setattr(f"tilebook.kernels.cross_entropy.{other}", None)
    found = ours(x, target, reduction=reduction)
    torch.testing.assert_close(found, right)
    assert found[1].stride() == x.stride() or not own


@interpreted
def test_one_row_without_an_axis_of_rows_and_no_rows_at_all():
    x = torch.randn(30, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        for target in (torch.tensor(4), torch.tensor(-100)):
            right = gradient(F.cross_entropy, x, target, reduction=reduction)
            for mine, other in zip(ours(x, target, reduction=reduction), right, strict=True):
                torch.testing.assert_close(mine, other, equal_nan=True)
        nothing = torch.randn(0, 30, requires_grad=True), torch.empty(0, dtype=torch.int64)
        right = gradient(F.cross_entropy, *nothing, reduction=reduction)
        torch.testing.assert_close(ours(*nothing, reduction=reduction), right, equal_nan=True)


@interpreted
def test_the_dtype_is_that_of_the_input_and_fp32_under_autocast():
    for dtype in DTYPES:
        x, target = drawn((6, 24), dtype)
        assert ours(x, target)[0].dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            loss, dx = ours(x, target)
            theirs = F.cross_entropy(x, target).dtype
        assert (loss.dtype, theirs, dx.dtype) == (torch.float32, torch.float32, dtype)
        assert abs(loss.item() - exact(x, target).item()) < 1e-5  # no rounding to 16 bits on the way


@interpreted
@pytest.mark.parametrize("options", [{"weight": torch.rand(24)}, {"weight": torch.rand(24), "softcap": 2.0}], ids=len)
def test_weights_and_probabilities_are_pytorchs(options):
    x, target = drawn((6, 24))
    capped = 2 * torch.tanh(x / 2) if "softcap" in options else x
    torch.testing.assert_close(ours(x, target, **options)[0], F.cross_entropy(capped, target, weight=options["weight"]))
    spread = torch.softmax(torch.randn(6, 24), 1)
    torch.testing.assert_close(ours(x, spread)[0], F.cross_entropy(x, spread))


def test_options_of_ours_run_as_plain_pytorch_too():
    for shape in ((6, 24), (2, 24, 3)):
        x = torch.randn(shape, requires_grad=True)
        target = torch.randint(24, shape[:1] + shape[2:])
        target[0] = -100
        for reduction in ("mean", "sum", "none"):
            options = {"softcap": 3.0, "z_loss": 0.1, "reduction": reduction, "label_smoothing": 0.1}
            right = gradient(exact, x, target, **options)
            for mine, other in zip(gradient(tilebook.cross_entropy, x, target, **options), right, strict=True):
                torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(())}, r"input must be floating point \(N, C, …\) or \(C,\), not torch.float32 \(\)"),
        ({"input": torch.zeros(3, 8, dtype=torch.int64)}, "input must be floating point"),
        ({"input": 1.0}, "expected a tensor"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, r"expected target \(3,\) for input \(3, 8\), not \(4,\)"),
        ({"target": torch.zeros(3)}, r"expected target \(3, 8\) for input \(3, 8\), not \(3,\)"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, "target must be int64, or probabilities"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, "target is on meta, but input on cpu"),
        ({"weight": torch.zeros(7)}, r"expected weight \(8,\) on cpu, not \(7,\) on cpu"),
        ({"weight": torch.zeros(8), "z_loss": 0.1}, "z_loss takes class indices as targets, and no weight"),
        ({"reduction": "median"}, "reduction must be one of mean, sum, none, not 'median'"),
        ({"label_smoothing": 1.5}, "label_smoothing must lie between 0 and 1, not 1.5"),
        ({"label_smoothing": math.nan}, "label_smoothing must lie between 0 and 1"),
        ({"softcap": -1.0}, "softcap must not be negative, infinite or NaN, not -1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_inputs_are_named(change, message):
    arguments = {"input": torch.zeros(3, 8), "target": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        tilebook.cross_entropy(**arguments)
