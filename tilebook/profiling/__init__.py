"""What a program's calls take while it runs: the part of `tilebook profile` that is inside of the program.

Dispatch counts its calls as ever. In windows of some tenths of a second they are timed as well, by events on their
stream that are read when all is over: nothing waits for the GPU, and each call runs what it would run otherwise. In
windows calls that C++ serves by recorded launches are asked about in Python.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing.util
import os
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from tilebook.profiling.watching import Watching


def begin(folder: str) -> None:
    """Has this process, and those forked off it, write what their calls take into the folder when they end."""
    place = Path(folder)
    watching = Watching(place, **json.loads((place / "options.json").read_text(encoding="utf-8")))
    watching.watch()
    register_optimizer_step_post_hook(watching.notes.stepped)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=watching.forked)
    multiprocessing.util.register_after_fork(
        watching, lambda it: multiprocessing.util.Finalize(None, it.finish, exitpriority=0)
    )
    atexit.register(watching.finish)
    watching.write({"state": "begun"})
