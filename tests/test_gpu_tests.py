"""Tests for GPUs, which `make test` does not meet where there is none, are at least there to be run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="they are met as all others")


@pytest.mark.usefixtures("forked")
def test_they_can_be_collected(pytestconfig):
    if not pytestconfig.getoption("--sample"):
        pytest.skip("they are met as all others")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sum(int(line.rpartition(":")[2]) for line in done.stdout.splitlines() if line.startswith("tests/gpu")) > 1000
