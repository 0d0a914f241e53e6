"""The live view of a tuning run on stderr: a rich panel on a terminal, a line per problem elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tilebook.tuner.progress import ProblemState, Run

_HEARTBEAT_S = 15.0


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def line(state: ProblemState, measured: bool) -> str:
    """One problem in one line."""
    if state.error:
        return f"{state.op} {state.label}: failed: {state.error}"
    if state.skipped:
        return f"{state.op} {state.label}: has a verdict already"
    what = f"{state.compiled} compiled"
    if measured:
        what += f", {state.verified} verified, {state.timed} timed"
    if state.reused:
        what += f", {state.reused} from before"
    rejected = ", ".join(f"{n} {failure.value}" for failure, n in sorted(state.rejected.items()))
    what += f", rejected: {rejected}" if rejected else ""
    best = ""
    if state.best_ms is not None:
        mark = "" if measured else "~"
        best = f"; best {mark}{state.best_ms:.4g} ms"
        if state.default_ms is not None:
            best += f", default {mark}{state.default_ms:.4g} ms ({state.default_ms / state.best_ms:.2f}x)"
    return f"{state.op} {state.label}: {what}{best}; {_time(state.elapsed_s)}"


class _View(Run):
    """Redraws on every change, at most ten times a second."""

    live: Live | None = None
    console: Console
    _last = 0.0

    def changed(self) -> None:
        now = time.monotonic()
        if self.live is not None:
            if now - self._last > 0.1 or self.now is None:
                self._last = now
                self.live.update(self.render())
        elif self.now is not None and now - self._last > _HEARTBEAT_S:
            self._last = now
            self.console.print(f"  … {line(self.now, self.measured)}", soft_wrap=True)

    def end(self) -> None:
        super().end()
        self.console.print(f"[{len(self.done)}/{self.total}] {line(self.done[-1], self.measured)}", soft_wrap=True)

    def render(self) -> Group:
        parts: list[Any] = []
        if self.now is not None:
            share = self.now.tried / max(self.now.limit, 1)
            bar = "━" * int(30 * min(share, 1.0))
            parts.append(Text(f"{bar:╌<30} {self.now.tried}/{self.now.limit} candidates"))
            parts.append(Text(line(self.now, self.measured)))
            if self.now.best:
                parts.append(Text(f"best so far: {self.now.best}"))
        left = f", {_time(max(0.0, self.deadline - time.monotonic()))} left" if self.deadline is not None else ""
        parts.append(Text(f"problem {min(len(self.done) + 1, self.total)} of {self.total}{left}"))
        return Group(*parts)


@contextmanager
def view(total: int, measured: bool, deadline: float | None) -> Iterator[Run]:
    """A run that shows itself on stderr while the block lasts."""
    console = Console(file=sys.stderr, highlight=False, markup=False)
    run = _View(total, measured, deadline)
    run.console = console
    if not console.is_terminal:
        yield run
        return
    with Live(run.render(), console=console, refresh_per_second=4, transient=True) as live:
        run.live = live
        yield run
