"""DTensor splits our ops over GPUs by batch and by heads, without a word between them, and adds up shared gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded

WORLD = 2
NAMES = ["compiled", *sharded.CASES, "heads of a plane", *sharded.SENT]


@pytest.fixture(scope="module")
def said(tmp_path_factory, forked_here):
    """What each process said of each case."""
    script, file = Path(__file__).with_name("sharded.py"), tmp_path_factory.mktemp("group") / "file"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(WORLD), str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        done = [each.communicate(timeout=300) for each in started]
    finally:
        for each in started:
            each.kill()
    return [(dict(json.loads(line) for line in out.splitlines()), error) for out, error in done]


@pytest.mark.parametrize("name", NAMES)
def test_sharded_calls_and_their_gradients_are_right(said, name):
    for found, error in said:
        assert found.get(name, error) == ""
