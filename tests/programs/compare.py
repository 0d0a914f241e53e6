"""Two ways to the same numbers: ours may be twice as far from the truth as PyTorch's, and no further."""

import contextlib

import pytest
import torch

FLOOR = {torch.float64: 64.0, torch.float32: 64.0, torch.bfloat16: 1.0, torch.float16: 1.0}
"""Errors that say nothing, in units of the dtype's epsilon at the largest value."""


def tensors(values):
    """The tensors among a call's results, which may be one."""
    return [values] if isinstance(values, torch.Tensor) else [x for x in values if isinstance(x, torch.Tensor)]


def cotangent(x):
    """A gradient to begin with: numbers that every dtype holds exactly, the same on every device."""
    numbers = torch.randint(-32, 33, x.shape, generator=torch.Generator().manual_seed(7)) / 16
    return numbers.to(x.device, x.dtype)


def fresh(inputs):
    """The same inputs as new leaves, in the same memory."""
    return tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)


def dense(inputs):
    """The same inputs as new leaves in memory of their own, where PyTorch's kernels can load them however they like."""
    return tuple(
        x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(x.requires_grad) for x in inputs
    )


def doubled(inputs):
    """The same inputs in fp64, as new leaves."""
    return tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x.detach() for x in inputs
    )


def value_and_gradients(function, inputs):
    """What the function gives, then the gradient of every input that asks for one."""
    out = function(*inputs)
    needed = [x for x in inputs if x.requires_grad]
    if not needed or not out.requires_grad:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, needed, cotangent(out))]


def assert_as_near(ours, plain, truth, what="", blur=1.0):
    """Each of `ours` is about as near to the truth as PyTorch's value is, and finite wherever that is.

    `blur` widens what counts as no error, for programs that round more often than the truth's dtype tells.
    """
    assert len(ours) == len(plain) == len(truth), what
    largest = max([x.nan_to_num(posinf=0, neginf=0).abs().max().item() for x in truth if x.numel()], default=0.0)
    for i, (got, theirs, right) in enumerate(zip(ours, plain, truth, strict=True)):
        name = f"{what} {'value' if i == 0 else f'gradient {i}'}".strip()
        assert got.shape == theirs.shape, name
        assert got.dtype == theirs.dtype, name
        assert got.device == theirs.device, name
        if not right.numel():
            continue
        finite = right.isfinite()
        assert torch.equal(got.double()[~finite], right.double()[~finite]) or not got[~finite].isfinite().any(), name
        got, theirs, right = (torch.where(finite, x.double(), 0.0) for x in (got, theirs, right))
        assert got.isfinite().all(), f"{name}: NaN or infinity where there is a number"
        scale = max(right.abs().max().item(), 0.25 * largest)  # what cancels to nothing came from numbers of some size
        floor = blur * FLOOR[ours[i].dtype] * torch.finfo(ours[i].dtype).eps * scale
        error, allowed = (got - right).abs().max().item(), 2 * (theirs - right).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def _size(x):
    """The root of its mean square."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_no_further(ours, plain, truth, what=""):
    """A value and its gradients are at most twice as far from the truth as PyTorch's: in the root of the mean square.

    That of a tensor is much the same whatever the order in which its numbers were added up, so nothing is allowed to a
    value beside it. Gradients may cancel to less than the rounding of what they are made of, and there PyTorch may be
    exact by luck: half a rounding step is allowed to them, at their own size or at a quarter of the largest one's.
    """
    assert len(ours) == len(plain) == len(truth), what
    largest = max(map(_size, truth[1:]), default=0.0)
    for i, (got, theirs, right) in enumerate(zip(ours, plain, truth, strict=True)):
        name = f"{what} {f'gradient {i}' if i else 'value'}".strip()
        assert (got.shape, got.dtype, got.device) == (theirs.shape, theirs.dtype, theirs.device), name
        step = 0.5 * torch.finfo(got.dtype).eps * max(_size(right), 0.25 * largest) if i else 0.0
        error, allowed = _size(got - right), 2 * _size(theirs - right) + step
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def some_calls(inputs):
    """Enough calls for plans to begin, which they do on the third of a GPU."""
    return 4 if inputs[0].is_cuda else 1


def _on_some_path(plain, inputs):
    """PyTorch's values and gradients, of tensors that its kernels take without breaking down.

    Where those that it picks refuse, those of its plainest path; and what was raised.
    """
    raised = None
    try:
        theirs = value_and_gradients(plain, dense(inputs))
        if all(x.isfinite().all() for x in theirs if x.is_floating_point()):
            return theirs, None
    except RuntimeError as refused:
        if "CUDA error" in str(refused):
            raise
        raised = refused
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return value_and_gradients(plain, dense(inputs)), raised


def assert_no_worse(ours, plain, inputs, *, calls=None, context=contextlib.nullcontext, what="", blur=1.0):
    """`ours` gives PyTorch's values and gradients, on each of the first calls."""
    truth = value_and_gradients(plain, doubled(inputs))
    with context():
        theirs, raised = _on_some_path(plain, inputs)
    for call in range(calls or some_calls(inputs)):
        try:
            with context():
                got = value_and_gradients(ours, fresh(inputs))
        except RuntimeError as refused:
            if raised is None or str(refused) != str(raised):
                raise
            continue  # what PyTorch's own kernel refuses so may be refused so
        assert_as_near(got, theirs, truth, f"{what} call {call + 1}", blur)


def assert_same_outcome(ours, plain, inputs, *, calls=None):
    """As `assert_no_worse`; and where PyTorch raises, ours raises the same."""
    try:
        value_and_gradients(plain, fresh(inputs))
    except Exception as refused:
        if "CUDA error" in str(refused):
            raise
        for _ in range(calls or some_calls(inputs)):
            with pytest.raises(type(refused)):
                value_and_gradients(ours, fresh(inputs))
        return
    assert_no_worse(ours, plain, inputs, calls=calls)
