"""Max pooling on a GPU: its gradient by our kernel has PyTorch's bits, in every config and in a training step."""

import pytest
import torch
import torch.nn.functional as F

import tilebook
from tilebook import device as devices
from tilebook import dispatch, native
from tilebook.kernels.pooling.ops import max_pool2d_bwd
from tilebook.kernels.pooling.problem import Problem

pytestmark = pytest.mark.gpu

SHAPES = (
    "B4,C64,H112,k3x3s2x2p1x1",
    "B3,C40,H31,W17,k3x5s2x1p1x2",
    "B2,C16,H28,k2x2s2x2p0x0",
    "B3,C48,H31,W17,k3x3s2x2p1x1,last",
)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_feasible_configs_are_right(shape, dtype):
    problem, ours = Problem.parse(shape, dtype), max_pool2d_bwd.tunable
    inputs = problem.inputs("cuda", 0)
    (pytorchs,) = max_pool2d_bwd.implementations["torch"](*inputs)
    truth = max_pool2d_bwd.reference(inputs[0].double(), *inputs[1:])
    for config in ours.space.feasible(problem, devices.current()):
        (found,) = ours(*inputs, config=config)
        assert found.stride() == pytorchs.stride()
        if problem.last:  # PyTorch's adds up in another order there
            error = torch.finfo(problem.torch_dtype).eps * truth.abs().max()
            assert (found - truth).abs().max() <= error, config
        else:
            assert torch.equal(found, pytorchs), config


@pytest.mark.parametrize("laid", [torch.contiguous_format, torch.channels_last])
def test_a_training_step_has_the_same_gradients(laid):
    if not native.available():
        pytest.skip("the extension is not built")
    torch.manual_seed(0)
    x = torch.randn(8, 64, 56, 56, device="cuda").contiguous(memory_format=laid).requires_grad_()

    def step():
        y = F.max_pool2d(x.bfloat16(), 3, 2, 1)
        return torch.autograd.grad(y.float().square().mean(), x)[0]

    plain = step()
    with tilebook.enabled(), dispatch.use("triton"):
        found = [step() for _ in range(4)]
    torch.testing.assert_close(found, [plain] * 4, rtol=0.01, atol=0.01 * plain.abs().max().item())
