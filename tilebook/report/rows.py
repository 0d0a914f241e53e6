"""Verdicts as rows: for JSON, and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from tilebook import device as devices
from tilebook import op as ops
from tilebook.registry import Revocation, Verdict
from tilebook.registry.current import retired
from tilebook.tuner.known import cut_short
from tilebook.tuner.progress import ProblemState


def stale(verdict: Verdict) -> list[str]:
    """The versions that differ between the verdict's environment and this one; none where no GPU is here to serve."""
    here = devices.environment() if devices.present() else {}
    return [
        f"{name} {version} → {here[name]}"
        for name, version in sorted(verdict.environment.versions.items())
        if name in here and here[name] != version and name not in ("python", "tilebook")
    ]


UNREACHED = "not reached"
"""The status of a problem for which a run found no time; it has a verdict's row without a verdict."""


def _label(verdict: Verdict) -> str:
    try:
        problem = ops.get(verdict.op).problem.from_key(verdict.problem)
        return f"{problem.label} {getattr(problem, 'dtype', '')}".strip()
    except (ops.UsageError, TypeError, ValueError):
        return verdict.problem  # an op or a field that this version does not know


def is_retired(verdict: Verdict) -> bool:
    """Is the winner not served, because its source or that of the op's own kernel is another now?"""
    op = ops.ops().get(verdict.op)
    if op is None:
        return True
    return retired(verdict, verdict.implementation, op.digest, op.digest_of)


def row(verdict: Verdict, layer: str, revocation: Revocation | None = None) -> dict[str, Any]:
    """One verdict as plain data; times in milliseconds, null where nothing was measured.

    `revocation` is what keeps the winner from being served; its reason becomes the field `revoked`, null without one.
    """
    notes = verdict.notes
    return {
        "op": verdict.op,
        "problem": _label(verdict),
        "device": verdict.device.name,
        "implementation": verdict.implementation,
        "config": dict(verdict.config),
        "status": verdict.status.value,
        "time_ms": verdict.time_ms,
        "default_time_ms": verdict.default_time_ms,
        "speedup": verdict.speedup,
        "speedup_low": verdict.speedup_low,
        "speedup_high": verdict.speedup_high,
        "predicted_ms": verdict.winner.predicted_ms,
        "predicted_default_ms": notes.get("predicted_default_ms"),
        "layer": layer,
        "stale": bool(stale(verdict)),
        "trusted": verdict.trusted,
        "retired": is_retired(verdict),
        "revoked": None if revocation is None else revocation.reason,
        "tried": notes.get("tried"),
        "rejected": notes.get("rejected"),
        "infeasible": notes.get("infeasible"),
        "seconds": notes.get("seconds"),
        "busy": notes.get("busy"),
        "cut_short": cut_short(verdict),
        "mode": verdict.mode,
        "others": _others(verdict),
        "measured_at": verdict.created_at.isoformat(),
    }


def tuned(states: Iterable[ProblemState], layer: str, gpu: str) -> list[dict[str, Any]]:
    """Rows of what a run has tuned, and of what it did not reach. What failed has none."""
    found = []
    for state in states:
        if state.verdict is not None:
            found.append(row(state.verdict, layer))
        elif state.unreached:
            found.append(_unreached(state.op, f"{state.label} {state.dtype}".strip(), gpu, state.unreached))
    return found


def _unreached(op: str, problem: str, device: str, why: str) -> dict[str, Any]:
    """A problem that a run did not reach, with the fields of a verdict's row and the reason beside."""
    unknown = ("time_ms", "default_time_ms", "speedup", "speedup_low", "speedup_high", "implementation", "layer")
    named = {"op": op, "problem": problem, "device": device, "status": UNREACHED, "reason": why}
    return {**named, **dict.fromkeys(unknown), "config": {}, "others": {}, "stale": False}


def _others(verdict: Verdict) -> dict[str, float]:
    """ms of the fastest of each implementation but the one whose default is the baseline, by name."""
    ours = next((each.implementation for each in verdict.finalists if each.default), verdict.implementation)
    found: dict[str, float] = {}
    for each in verdict.finalists:
        if each.implementation != ours and each.time_ms is not None:
            found[each.implementation] = min(each.time_ms, found.get(each.implementation, each.time_ms))
    return found


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def table(rows: Sequence[dict[str, Any]], stream: TextIO, tuned: bool = False) -> None:
    """Prints rows for people: who wins, by how much, how sure, what lost; and when `tuned` just now, what it took."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Names come from registries, which may be a stranger's: nothing in them is markup.
    console = Console(file=stream, width=None if stream.isatty() else 160, highlight=False, markup=False, emoji=False)
    left_out = [each for each in rows if each["status"] == UNREACHED]
    rows = [each for each in rows if each["status"] != UNREACHED]
    for each in left_out:
        console.print(f"not reached: {each['op']} {each['problem']}: {each['reason']}", soft_wrap=True)
    if not rows and left_out:
        return
    if not rows:
        console.print("no verdicts: run `tilebook tune` first")
        return

    def draw(title: str, left: str, right: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        grid.pad_edge, grid.collapse_padding = False, True
        grid.add_column(left, overflow="fold")
        for name in right:
            grid.add_column(name, justify="right", no_wrap=True)
        for each in cells:
            grid.add_row(*each)
            grid.add_section()
        console.print(grid)

    named = ", ".join(sorted({str(each["device"]) for each in rows}))
    title = f"{'tuned for' if tuned else 'verdicts for'} {named}"
    draw(title, "problem, winner", ["ms", "speed-up"], [_outcome(each) for each in rows])
    if tuned:
        spent = ["tried", "compile s", "measure s", "wait s", "GPU busy", "all s"]
        draw("what it took", "problem, rejected", spent, [_effort(each) for each in rows])
    if any(each["status"] == "predicted" for each in rows):
        from tilebook.tuner.decide import DOUBT

        console.print(
            "~ predicted by a performance model from the compiled code; nothing was measured. The default is kept where"
            f" the model promises no more than {DOUBT:g} times its speed, which is how far it errs. What was measured,"
            " in any layer, is served before what is predicted: see `tilebook show`.",
            soft_wrap=not stream.isatty(),
        )


def _ms(value: float | None, mark: str = "") -> str:
    return "–" if value is None else f"{mark}{value:.4g}"


def _outcome(each: dict[str, Any]) -> list[str]:
    if each["status"] == "predicted":
        default_ms, winner_ms = _ms(each["predicted_default_ms"], "~"), _ms(each["predicted_ms"], "~")
    else:
        default_ms, winner_ms = _ms(each["default_time_ms"]), _ms(each["time_ms"])
    ratio = {"predicted": "–", "default": "default wins"}.get(each["status"], "")
    if each["status"] == "predicted" and each["predicted_ms"] == each["predicted_default_ms"]:
        ratio = "default stays"
    if each["status"] == "measured":
        ratio = f"{each['speedup']:.3f}\n[{each['speedup_low']:.3f}, {each['speedup_high']:.3f}]"
    flags = [each["status"], each["layer"]]
    flags += [each["mode"]] if each["mode"] == "eager" else []
    flags += ["cut short"] if each["cut_short"] else []
    flags += ["stale"] if each["stale"] else []
    flags += [] if each["trusted"] else ["not trusted"]
    flags += ["retired"] if each["retired"] else []
    flags += ["revoked"] if each["revoked"] else []
    config = " ".join(f"{axis}={value}" for axis, value in each["config"].items())
    others = {name: _ms(time_ms) for name, time_ms in each["others"].items() if name != each["implementation"]}
    times = {each["implementation"]: winner_ms, **({} if each["status"] == "default" else {"default": default_ms})}
    return [
        f"{each['op']} {each['problem']}\n{each['implementation']} {config}".strip() + f"\n({', '.join(flags)})",
        "\n".join(f"{name} {time}" for name, time in {**times, **others}.items()),
        ratio,
    ]


def _effort(each: dict[str, Any]) -> list[str]:
    spent, busy = each["seconds"] or {}, each["busy"]
    rejected = ", ".join(f"{count} {reason}" for reason, count in (each["rejected"] or {}).items())
    measured = each["status"] != "predicted"
    shown = ["compiling", "measuring" if measured else "", "waiting" if measured else "", "total"]
    times = [f"{spent[name]:.0f}" if name in spent else "–" for name in shown]
    return [
        f"{each['op']} {each['problem']}" + (f"\nrejected: {rejected}" if rejected else ""),
        "–" if each["tried"] is None else str(each["tried"]),
        *times[:3],
        "–" if busy is None else f"{busy:.0%}",
        times[3],
    ]
