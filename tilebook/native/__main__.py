"""Builds the extension and says where it is, or why there is none: `python -m tilebook.native [--nice]`."""

from __future__ import annotations

import os
import sys

from tilebook.native.build import BuildError, build

if __name__ == "__main__":
    if "--nice" in sys.argv[1:]:
        os.nice(19)
    try:
        print(build())
    except BuildError as broken:
        sys.exit(f"tilebook: {broken}")
