"""The command line: parses, calls, prints. Data goes to stdout, progress and errors to stderr.

Exit status: 0 done; 1 a registry or file could not be used, or a problem could not be tuned; 2 wrong usage; 130 Ctrl-C.
"""

from tilebook.cli import recheck, registry, tuning  # noqa: F401 (their commands are the group's)
from tilebook.cli.common import main

__all__ = ["main"]
