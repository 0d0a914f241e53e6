"""A program that a command runs in its own place."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from typing import Any

import click


def run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs it in our place and returns its exit status. Ctrl-C is for the program, and so is what ends us."""
    started: list[subprocess.Popen[bytes]] = []

    def told(number: int, _: Any) -> None:
        if number == signal.SIGTERM:  # a terminal sends Ctrl-C to both
            for each in started:
                each.send_signal(number)

    # What is handled here is not inherited; what is ignored would be.
    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        started.append(subprocess.Popen(command, env=environment))
        status = started[0].wait()
    except OSError as wrong:
        click.echo(f"tilebook: {command[0]} cannot be run: {wrong.strerror}", err=True)
        raise SystemExit(127 if isinstance(wrong, FileNotFoundError) else 126) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status
