"""Every op of ours is to PyTorch what an op of its own is, on a GPU: by our kernels and by PyTorch's functions."""

import sys
from pathlib import Path

import pytest
import torch

from tilebook import dispatch

sys.path.append(str(Path(__file__).parents[1] / "pytorch"))
from op_samples import BF16, DIFFERENTIABLE, EACH, forward, sample
from test_torch_ops import CHECKS, LAYOUTS, backward_of

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


def on_a_gpu(x):
    """The same numbers in the same layout."""
    if not isinstance(x, torch.Tensor):
        return x
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    (there if 0 not in x.stride() else there.as_strided(_once(x), x.stride())).copy_(_seen(x))
    return there.requires_grad_(x.requires_grad)


def _once(x):
    return [n if step else min(n, 1) for n, step in zip(x.shape, x.stride(), strict=True)]


def _seen(x):
    x = x.detach()
    return x if 0 not in x.stride() else x[tuple(slice(n) for n in _once(x))]


def check(op, args, tests):
    bf16 = any(isinstance(x, torch.Tensor) and x.dtype in (BF16, torch.float16) for x in args)
    near = {"rtol": 0.04, "atol": 0.02} if bf16 else {"rtol": 1e-3, "atol": 1e-4}
    torch.library.opcheck(op, tuple(on_a_gpu(x) for x in args), test_utils=tests, **near)


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize(("op", "name"), EACH)
def test_opcheck(op, name, choice):
    tests = CHECKS if name in LAYOUTS else [*CHECKS, "test_aot_dispatch_dynamic"]
    with dispatch.use(choice):
        check(forward(op), sample(op, name), tests)


@pytest.mark.parametrize("choice", ["torch", "triton"])
@pytest.mark.parametrize(("op", "name"), DIFFERENTIABLE)
def test_opcheck_of_the_backward_op(op, name, choice):
    backward, args = backward_of(op, name)
    with dispatch.use(choice):
        check(backward, args, CHECKS)
