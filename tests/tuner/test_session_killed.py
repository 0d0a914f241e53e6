"""A run that is killed, whenever that is, loses no trial that it had stored, and comes to the same verdict."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tilebook

KILLS = 12
"""benchmarks/kill_runs.py does the same with more."""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_runs_killed_at_random_moments_resume_without_loss_to_the_same_verdict():
    here = Path(__file__).parent
    paths = os.pathsep.join([str(Path(tilebook.__file__).parents[1]), str(here)])
    done = subprocess.run(
        [sys.executable, here / "killing.py", str(KILLS)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths + os.pathsep + os.environ.get("PYTHONPATH", "")},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{KILLS} runs killed" in done.stdout
