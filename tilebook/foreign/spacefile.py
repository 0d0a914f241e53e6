"""A file of spaces for kernels that have no autotuner, as it is written; no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tilebook.errors import UsageError

_PARTS = {"space", "key", "grid"}


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Kernel, "package.module:kernel", → its space, and perhaps a key and a grid. Raises UsageError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        wanted = {kernel: dict(each) for kernel, each in content.items()}
        if any("space" not in each or not each.keys() <= _PARTS for each in wanted.values()):
            raise ValueError("each kernel has a space, and perhaps a key and a grid")
        for kernel, each in wanted.items():
            if not all(kernel.partition(":")):
                raise ValueError(f"{kernel!r} is not package.module:kernel")
            space = each["space"]
            if not isinstance(space, dict) or not space or not all(isinstance(v, list) and v for v in space.values()):
                raise ValueError(f"the space of {kernel} has not a list of values for each axis")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as wrong:
        raise UsageError(f"{file} has no spaces: {wrong}") from None
    return wanted
