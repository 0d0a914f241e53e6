"""`TILEBOOK_LOG=debug`: what the logger "tilebook" says, on stderr. Without it who wants to hear sets logging up."""

from __future__ import annotations

import logging
import os

ASKED = "TILEBOOK_LOG"

log = logging.getLogger("tilebook")


def begin() -> None:
    """Does what the environment asks for: a level by its name, in any case. Of an unknown one it says so."""
    level = os.environ.get(ASKED, "").strip().upper()
    if not level or log.handlers:
        return
    known = logging.getLevelNamesMapping()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("tilebook: %(message)s"))
    log.addHandler(handler)
    log.propagate = False  # or a program that has set logging up would hear it twice
    log.setLevel(known.get(level, logging.WARNING))
    if level not in known:
        log.warning("%s=%s is no level such as debug or info", ASKED, level.lower())
