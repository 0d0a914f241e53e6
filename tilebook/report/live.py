"""The live view of a tuning run on stderr: a few lines a GPU on a terminal, a line per problem elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tilebook.registry import VerdictStatus
from tilebook.registry.searched import cut_short
from tilebook.report.rows import default_stays
from tilebook.report.rows import seconds as _time
from tilebook.tuner.progress import ProblemState, Run

_HEARTBEAT_S = 15.0
_BAR = 24
_PANELS = 5  # more problems under way than this have a line each


def line(state: ProblemState) -> str:
    """A finished problem in one line: what came of it, and what it took."""
    name = f"{state.op} {state.label}"
    if state.error:
        return f"{name}: failed: {state.error}"
    if state.skipped:
        measured = state.verdict is not None and state.verdict.measured
        return f"{name}: has a {'measured ' if measured else ''}verdict already"
    if state.unreached:
        stands = "" if state.verdict is None else "; the verdict from before stands"
        return f"{name}: not reached: {state.unreached}{stands}; {_counts(state)}, {_time(state.elapsed_s)}"
    verdict, outcome = state.verdict, "no verdict"
    if verdict is not None:
        chosen = " ".join([verdict.implementation, *(f"{axis}={value}" for axis, value in verdict.config.items())])
        if verdict.status is VerdictStatus.MEASURED:
            low, high = verdict.speedup_low or 0.0, verdict.speedup_high or 0.0
            outcome = f"{verdict.speedup or 0.0:.2f}x [{low:.2f}, {high:.2f}] over the default: {chosen}"
        elif verdict.status is VerdictStatus.DEFAULT:
            outcome = f"the default wins: {chosen}"
        else:
            stays = f"the default stays, {why}: " if (why := default_stays(verdict)) else ""
            outcome = f"predicted: {stays}{chosen}"
    cut = "; cut short by the budget, another run goes on" if verdict is not None and cut_short(verdict) else ""
    return f"{name}: {outcome}{cut}; {_counts(state)}, {_time(state.elapsed_s)}{_busy(state)}"


def _counts(state: ProblemState) -> str:
    text = f"{state.tried} tried"
    text += f" ({state.reused} from before)" if state.reused else ""
    rejected = ", ".join(f"{n} {failure.value}" for failure, n in sorted(state.rejected.items()))
    text += f", rejected {rejected}" if rejected else ""
    return f"{text}, {state.revoked} revoked" if state.revoked else text


def _busy(state: ProblemState) -> str:
    return "" if state.busy is None else f", GPU {state.busy:.0%} busy"


def _gpu(state: ProblemState) -> str:
    return state.where or f"GPU {state.gpu}"


def _panel(state: ProblemState, run: Run) -> list[Text]:
    """A problem under way: what and how far, how good, where the time goes."""
    mark = "" if run.measured else "~"
    where = f"{_gpu(state)}: " if run.gpus > 1 else ""
    share = min(1.0, state.tried / max(state.limit, 1))
    bar = f"{'━' * round(_BAR * share):╌<{_BAR}}"
    parts = [
        Text(f"{where}{state.op} {state.label}", style="bold"),
        Text(f"  {bar} {state.phase}, {_time(state.elapsed_s)}; {_counts(state)}"),
    ]
    if state.best_ms is not None:
        gain = f" ({state.default_ms / state.best_ms:.2f}x the default)" if state.default_ms else ""
        parts.append(Text(f"  best {mark}{state.best_ms:.4g} ms{gain}: {state.best}"))
    spent = f"  {state.compiled} compiled in {_time(state.compiling_s)}"
    if run.measured:
        spent += f", {state.timed} timed; measuring {_time(state.measuring_s)}, waiting {_time(state.waiting_s)}"
    parts.append(Text(spent, style="dim"))
    for part in parts:
        part.no_wrap, part.overflow = True, "ellipsis"
    return parts


def _row(state: ProblemState) -> Text:
    name = f"{_gpu(state)}: {state.op} {state.label}"
    text = f"{name}: {state.phase}, {state.tried} of {state.limit}, {_time(state.elapsed_s)}"
    return Text(text, no_wrap=True, overflow="ellipsis")


class _View:
    """Draws a run on a terminal; elsewhere it says every now and then that it lives, and what came of each problem."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        self._last = time.monotonic()
        self._failure = ""

    def changed(self, run: Run) -> None:
        now = time.monotonic()
        if not self.console.is_terminal and run.now and now - self._last > _HEARTBEAT_S:
            self._last = now
            for state in run.now:
                mark = "" if run.measured else "~"
                best = "" if state.best_ms is None else f", best {mark}{state.best_ms:.4g} ms"
                best += f" (default {mark}{state.default_ms:.4g})" if best and state.default_ms else ""
                text = f"  … {state.op} {state.label}: {state.phase}, {_counts(state)}{best}, {_time(state.elapsed_s)}"
                self.console.print(text, soft_wrap=True)

    def ended(self, run: Run, state: ProblemState, again: bool) -> None:
        if state.unreached and not state.tried and not again:
            return  # which the table says that the run ends with
        count = f"{len(run.done)}/{run.total}{f', {state.where}' if state.where else ''}"
        if again:
            count = f"{_gpu(state)}, to be tried on another"
        alike = bool(state.error) and state.error == self._failure
        self._failure = state.error
        told = f"{state.op} {state.label}: failed as the one before did" if alike else line(state)
        self.console.print(f"[{count}] {told}", soft_wrap=True)

    def told(self, run: Run, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def render(self) -> Group:
        run = self.run
        short = len(run.now) > _PANELS  # the last line, how much is done, must stay on the screen
        parts = [part for state in run.now for part in ([_row(state)] if short else _panel(state, run))]
        left = f", {_time(max(0.0, run.budget.left_s))} left" if run.budget.limited else ""
        return Group(*parts, Text(f"{len(run.done)} of {run.total} problems done{left}"))


@contextmanager
def view(run: Run) -> Iterator[None]:
    """Shows a run on stderr while the block lasts."""
    watcher = _View(run, Console(file=sys.stderr, highlight=False, markup=False))
    run.watchers.append(watcher)
    if not watcher.console.is_terminal:
        yield
        return
    live = Live(
        get_renderable=watcher.render,
        console=watcher.console,
        refresh_per_second=4,
        transient=True,
        redirect_stdout=False,  # whoever prints there while a run goes has it led elsewhere already
    )
    with live:
        yield
