"""What the environment asks for by variables that turn something on."""

from __future__ import annotations

import os

ASKED = "TILEBOOK"
"""Our functions in the places of PyTorch's."""

PROBE = "TILEBOOK_PROBE"
"""Problems settled by running programs."""

PROFILED = "TILEBOOK_PROFILE"
"""Names the folder that `tilebook profile` has made, for what it starts."""

SPACES = "TILEBOOK_SPACES"
"""Names a JSON file of spaces for kernels of others that have no autotuner, read where `TRITON` asks for anything."""

TRITON = "TILEBOOK_TRITON"
"""Kernels of others recorded, "record" or "record:FOLDER", or served, "serve"."""


def value(name: str) -> str:
    """What a variable says, in small letters; "yes" for all that means no more than that, "" for what means no."""
    told = os.environ.get(name, "").strip().lower()
    return "yes" if told in ("1", "true", "yes", "on") else "" if told in ("0", "false", "no", "off") else told
