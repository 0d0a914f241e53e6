"""The kernels of others are imported by name, in workers too; what stands in for compilers is the tuner's tests'."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tuner"), str(HERE.parents[1] / "examples")]


@pytest.fixture(autouse=True)
def forgotten():
    """Ops that a test has made of kernels are its own."""
    from tilebook.foreign import ops, serving

    yield
    ops.forget()
    serving.reload()
    serving._missed.clear()
    serving._said.clear()
