"""What a process started, told and killed, wherever it has gone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path


def left_behind(spared: Collection[int] = ()) -> int:
    """In a serving child: kills what it has started and not waited for but `spared`, and says how many that were.

    Daemons are among them: a serving child adopts whatever its descendants leave behind.
    """
    found = 0
    with suppress(ChildProcessError):  # no children at all, which is the rule
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        while stray := [pid for pid in children() if pid not in spared]:
            for pid in stray:
                os.kill(pid, signal.SIGKILL)  # it cannot be gone: nobody but us waits for it
                os.waitpid(pid, 0)
                found += 1
    return found


def children() -> list[int]:
    """The processes whose parent is this one, as far as Linux tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # The name in parentheses may hold anything; after it come the state and the parent.
            if int((entry / "stat").read_bytes().rsplit(b")", 1)[1].split()[1]) == os.getpid():
                found.append(int(entry.name))
    return found


def has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Has it ended? Leaves it unreaped, so that its number stays taken."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def marked(mark: bytes) -> list[int]:
    """The processes that carry `mark`, a variable and its value, in their environment, as far as Linux tells."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # Others' processes cannot be read; those that have ended have no environment any more.
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill_marked(mark: bytes) -> None:
    """Kills what carries `mark` in its environment: what a child started and sent out of its process group."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        found = marked(mark)
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
