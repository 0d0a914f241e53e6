"""The devices of tests on the CPU: as a program finds it, and with our kernels in Triton's interpreter."""

import pytest

from tilebook import dispatch


@pytest.fixture(name="device")
def cpu():
    return "cpu"


@pytest.fixture(name="device")
def interpreted():
    with dispatch.use("triton"):
        yield "cpu"
