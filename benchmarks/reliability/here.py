"""What the programs of this folder write beside their figures."""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from revision import revision


def environment() -> dict[str, Any]:
    """Commit, versions and machine."""
    model = next(
        (row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row), ""
    )
    return {
        "commit": revision(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def tell(report: dict[str, Any], file: Path | None) -> None:
    """Prints a report, and writes it where a file is named."""
    text = json.dumps({"environment": environment(), **report}, indent=1)
    print(text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
