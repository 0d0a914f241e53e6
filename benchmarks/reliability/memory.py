"""How much memory a process takes, alone and with those that it has started."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any


class Family:
    """Another process, which looks ten times a second how much memory this one and those have that it has started."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
        self._watch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def most(self) -> dict[str, Any]:
        found, _ = self._watch.communicate("")
        return json.loads(found)  # type: ignore[no-any-return]


def watch(number: int) -> dict[str, Any]:
    """The most that there was, until stdin ends."""
    most, processes = 0.0, 1
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        family = [number, *(each for each in children(number) if each != os.getpid())]
        most, processes = max(most, sum(map(resident_mb, family))), max(processes, len(family))
    return {"together_mb": round(most, 1), "processes": processes}


def children(number: int) -> list[int]:
    return list(map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split()))


def resident_mb(number: int) -> float:
    """0 where it has ended."""
    try:
        rows = Path(f"/proc/{number}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(row.split()[1]) for row in rows if row.startswith("VmRSS")), 0) / 1024


def peak_mb() -> float:
    """Of this process alone; what `resource` says begins with the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(row.split()[1] for row in status if row.startswith("VmHWM"))) / 1024


if __name__ == "__main__":
    print(json.dumps(watch(int(sys.argv[1]))))
