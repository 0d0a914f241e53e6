"""Processes of one distributed program, each with a registry of its own."""

import os
import subprocess
import sys
from pathlib import Path

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def ranks(count, program, folder, **environment):
    """What so many processes print that run the program, by RANK; they meet at MEETING. All must end well."""
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program.format(paths=PATHS)],
            env={
                **os.environ,
                **environment,
                "RANK": str(rank),
                "MEETING": str(folder / "meeting"),
                "TILEBOOK_REGISTRY": str(folder / f"{rank}.db"),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    printed = [each.communicate(timeout=120)[0] for each in running]
    assert [each.returncode for each in running] == [0] * count
    return printed
