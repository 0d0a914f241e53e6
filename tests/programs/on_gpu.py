"""The device of tests on a GPU."""

import pytest


@pytest.fixture(name="device")
def gpu():
    return "cuda"
