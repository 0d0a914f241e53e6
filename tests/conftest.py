"""Without a GPU, kernels run in Triton's interpreter; the variable must stand before any kernel is decorated.

Test processes side by side have a core each: with more threads than that, small products wait for one another.
A shell starts what it runs in the background deaf to Ctrl-C, and so would be the tests that send it.
"""

import gc
import importlib.util
import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything that reads them is loaded
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

from contextlib import nullcontext

import pytest
import torch
from interpreter import mended

signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ["TILEBOOK_NATIVE"] = "0"  # the user's own build stays out of what is tested


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU in this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _mended():
    """What runs in Triton's interpreter runs as on a GPU."""
    with mended() if importlib.util.find_spec("triton") else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """What a file's tests find, modules above all, is not looked through by all their collections of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
