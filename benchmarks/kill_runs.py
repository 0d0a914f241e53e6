"""Kills tuning runs with SIGKILL at random moments, resumes them, and checks that nothing stored was lost.

    python benchmarks/kill_runs.py [COUNT]

The runs go against a compiler and a GPU that answer from a formula, into real SQLite files: the same as the test
`tests/tuner/test_session_killed.py`, with 100 kills unless told otherwise. No GPU needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tuner"))

from killing import kill_runs

if __name__ == "__main__":
    print(kill_runs(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
