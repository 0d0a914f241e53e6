"""What tilebook raises on purpose. Anything else that comes out of it is a defect of ours, and nobody catches it.

A call of model code raises what PyTorch raises for it: ValueError, TypeError, OutOfMemoryError.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CompilerError",
    "GpuLost",
    "OutOfTime",
    "RegistryError",
    "TilebookError",
    "TuningError",
    "UsageError",
    "meant",
    "one_line",
]


def one_line(text: object) -> str:
    """A text for people on one line. Of what is longer than two, a child's last words say, the first and the last."""
    lines = [" ".join(line.split()) for line in str(text).splitlines() if line.strip()]
    return " ".join(lines) if len(lines) <= 2 else f"{lines[0]} … {lines[-1]}"


def meant(name: str, known: Iterable[str]) -> str:
    """What a name that there is not may have been written for: " (did you mean a or b?)", or nothing."""
    import difflib

    every = sorted(known)
    longer = [each for each in every if each.startswith(f"{name}_")]
    found = (longer or difflib.get_close_matches(name, every, n=3, cutoff=0.7))[:3]
    return f" (did you mean {' or '.join(found)}?)" if found else ""


class TilebookError(Exception):
    """The command line prints the text in one line and ends with status 1."""


class UsageError(TilebookError, ValueError):
    """A name, shape or option that the user got wrong. The command line ends with status 2."""


class RegistryError(TilebookError):
    """A registry that cannot be used; the text says which and why."""


class TuningError(TilebookError):
    """A problem that cannot be tuned, or a GPU or compiler that cannot be worked with. Other problems may be."""


class CompilerError(TuningError):
    """A compile process failed at something that is no candidate's fault; the text is its traceback."""


class OutOfTime(TuningError):
    """The budget ended before a verdict could be reached. Trials are kept, and another run goes on from them."""


class GpuLost(TuningError):
    """The machine with the GPU is gone. What was tried on it is kept, and another GPU may go on from there."""
