"""Gradients of convolutions on a GPU: the weight's by our kernel, with right numbers, the others PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import device as devices
from tilebook import dispatch, native
from tilebook.kernels.convolution.ops import conv2d_weight_bwd
from tilebook.kernels.convolution.problem import Problem

pytestmark = pytest.mark.gpu

SHAPES = ("B8,C64,O384,H56,k7x7s2x2p3x3", "B3,C24,O40,H31,W17,k3x5s2x1p1x2", "B2,C16,O16,H9,k1x1s1x1p0x0")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_feasible_configs_are_right(shape, dtype):
    problem, ours = Problem.parse(shape, dtype), conv2d_weight_bwd.tunable
    dy, x, form = problem.inputs("cuda", 0)
    truth = conv2d_weight_bwd.reference(dy.double(), x.double(), form)
    feasible = ours.space.feasible(problem, devices.current())
    pytorchs = conv2d_weight_bwd.implementations["torch"](dy, x, form)[0]
    allowed = 2 * (pytorchs - truth).abs().max() + 1e-3 * truth.abs().max()
    for config in (ours.space.default(problem, devices.current()), *feasible[:: max(1, len(feasible) // 8)]):
        (found,) = ours(dy, x, form, config=config)
        assert found.shape == pytorchs.shape
        assert (found - truth).abs().max() <= allowed, config
        assert torch.equal(found, ours(dy, x, form, config=config)[0])


def _step(x, weight, bias):
    with torch.autocast("cuda", torch.bfloat16):
        y = F.conv2d(x, weight, bias, stride=2, padding=3)
        loss = y.float().square().mean()
    return torch.autograd.grad(loss, (x, weight, bias))


def test_a_training_step_has_the_same_gradients():
    if not native.available():
        pytest.skip("the extension is not built")
    torch.manual_seed(0)
    x = torch.randn(8, 64, 56, 56, device="cuda", requires_grad=True)
    weight = (torch.randn(384, 64, 7, 7, device="cuda") * 0.02).requires_grad_()
    bias = torch.randn(384, device="cuda", requires_grad=True)
    plain = _step(x, weight, bias)
    with tilebook.enabled(), dispatch.use("triton"):
        first = [_step(x, weight, bias) for _ in range(4)]
    for each in first:
        for found, wanted in zip(each, plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())
    torch.testing.assert_close([each[0] for each in first], [plain[0]] * 4, rtol=0, atol=0)
