"""Without a GPU, kernels run in Triton's interpreter; the variable must stand before any kernel is decorated."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU in this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
