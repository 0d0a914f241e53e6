"""Makes the injected ops importable by name, here and in workers, and the tuner's fakes; notices a GPU that stopped."""

import sys
from pathlib import Path

import pytest
import torch

here = Path(__file__).parent
sys.path[:0] = [str(here), str(here.parent / "tuner")]

_culprits = []


@pytest.fixture(autouse=True)
def _gpu_answers(request):
    """After an illegal access every call of its process fails: it is an error of its test, and the rest is skipped."""
    if _culprits:
        pytest.skip(f"the GPU no longer answers this process since {_culprits[0]}")
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _culprits.append(request.node.nodeid)
            raise
