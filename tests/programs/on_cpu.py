"""The devices of tests on the CPU: as they are, and with our kernels in Triton's interpreter."""

import pytest
import torch

from tilebook import dispatch

interpreted = pytest.param(
    "interpreted",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/gpu runs the kernels themselves"),
)


@pytest.fixture(name="device", params=["cpu", interpreted])
def either(request):
    """The CPU, with PyTorch's own code and then with our kernels wherever they can serve."""
    if request.param == "cpu":
        yield "cpu"
    else:
        with dispatch.use("triton"):
            yield "cpu"


@pytest.fixture(name="device")
def cpu():
    """The CPU, as a program finds it."""
    return "cpu"
