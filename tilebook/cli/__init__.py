"""The command line: parses, calls, prints. Data goes to stdout, progress and errors to stderr.

Exit status: 0 done; 1 a registry or file could not be used, or a problem could not be tuned; 2 wrong usage; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from typing import Any

try:
    from tilebook.cli.common import main
except ModuleNotFoundError as missing:
    if missing.name != "click":
        raise

    def main(*_: Any, **__: Any) -> None:  # type: ignore[misc]
        """Says what is not installed."""
        print(
            "tilebook: the command line needs click, and to tune more: pip install click alembic optuna rich",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


__all__ = ["main"]
