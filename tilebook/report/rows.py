"""Verdicts as rows: for JSON, and as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from tilebook import device as devices
from tilebook import inventory, machine
from tilebook.registry import DenyList, Revocation
from tilebook.registry.checks import quoted
from tilebook.registry.searched import DOUBT, cut_short, observed
from tilebook.report import grid
from tilebook.report.retired import is_retired

if TYPE_CHECKING:
    from tilebook.registry.overview import Shown
    from tilebook.tuner.progress import ProblemState


def stale(verdict: Shown) -> list[str]:
    """The versions that differ between the verdict's environment and this one; none where no GPU is here to serve."""
    here = machine.environment() if machine.present() else {}
    return [
        f"{name} {version} → {here[name]}"
        for name, version in sorted(verdict.environment.versions.items())
        if name in here and here[name] != version and name not in ("python", "tilebook")
    ]


def deny_list(revocations: Iterable[tuple[str, Revocation]]) -> DenyList:
    """Those of the layers that are honoured here. Which Triton this is is asked for only where there are any."""
    found = [each for _, each in revocations]
    return DenyList(found, devices.package_version("triton") if found else "")


BRIEF = (
    "over default: the time of our kernel's default config over the winner's. over PyTorch: that of PyTorch's fastest"
    " own kernel. `tilebook show --all` has the configs, the intervals and what lost.\n"
)

UNREACHED = "not reached"
"""The status of a problem for which a run found no time; it has a verdict's row without a verdict."""


def label(op: str, key: str) -> str:
    """A problem as people write it, with its dtype; the key where this version does not know the op or a field."""
    known = inventory.find(op)
    try:
        problem = None if known is None else known.problem.from_key(key)
    except (TypeError, ValueError):
        return key
    return key if problem is None else f"{problem.label} {getattr(problem, 'dtype', '')}".strip()


def row(verdict: Shown, layer: str, revocation: Revocation | None = None) -> dict[str, Any]:
    """One verdict as plain data; times in milliseconds, null where nothing was measured.

    `revocation` is what keeps the winner from being served; its reason becomes the field `revoked`, null without one.
    """
    notes, interval = verdict.notes, verdict.interval
    return {
        "op": verdict.op,
        "problem": label(verdict.op, verdict.problem),
        "device": verdict.device.name,
        "implementation": verdict.implementation,
        "config": dict(verdict.config),
        "status": verdict.status.value,
        "time_ms": verdict.time_ms,
        "default_time_ms": verdict.default_time_ms,
        "speedup": None if interval is None else interval.value,
        "speedup_low": None if interval is None else interval.low,
        "speedup_high": None if interval is None else interval.high,
        "predicted_ms": verdict.winner.predicted_ms,
        "predicted_default_ms": notes.get("predicted_default_ms"),
        "predicted_best_ms": _best_ms(verdict),
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
        "observed": observed(verdict),
        "mode": verdict.mode,
        "made": notes.get("made"),
        "others": _others(verdict),
        "measured_at": verdict.created_at.isoformat(),
    }


def tuned(states: Iterable[ProblemState], layer: str, gpu: str) -> list[dict[str, Any]]:
    """Rows of what a run has tuned, and of what it did not reach. What failed has none."""
    found = []
    for state in states:
        if state.verdict is not None and state.skipped:
            shipped = state.verdict.origin == "shipped"
            found.append({**row(state.verdict, "shipped" if shipped else layer), "skipped": True})
        elif state.verdict is not None:
            found.append(row(state.verdict, layer))
        elif state.unreached:
            found.append(_unreached(state.op, f"{state.label} {state.dtype}".strip(), gpu, state.unreached))
    return found


def _unreached(op: str, problem: str, device: str, why: str) -> dict[str, Any]:
    """A problem that a run did not reach, with the fields of a verdict's row and the reason beside."""
    unknown = ("time_ms", "default_time_ms", "speedup", "speedup_low", "speedup_high", "implementation", "layer")
    named = {"op": op, "problem": problem, "device": device, "status": UNREACHED, "reason": why}
    return {**named, **dict.fromkeys(unknown), "config": {}, "others": {}, "stale": False}


def _others(verdict: Shown) -> dict[str, float]:
    """ms of the fastest of each implementation but the one whose default is the baseline, by name."""
    ours = next((each.implementation for each in verdict.finalists if each.default), verdict.implementation)
    found: dict[str, float] = {}
    for each in verdict.finalists:
        if each.implementation != ours and each.time_ms is not None:
            found[each.implementation] = min(each.time_ms, found.get(each.implementation, each.time_ms))
    return found


PYTORCHS = frozenset({"torch", "cudnn", "mem_efficient", "torch_flash", "flash", "flash_attention_2"})
"""Implementations that are PyTorch's own kernels, the fastest of which is what to compare with."""


def over_pytorch(each: Mapping[str, Any]) -> float | None:
    """The time of PyTorch's fastest own kernel over the winner's, of a verdict's row; None where that was not measured.

    Of an observed verdict the baseline is PyTorch's own call.
    """
    winner_ms = each["time_ms"]
    if winner_ms is None:
        return None
    times = {**each["others"], each["implementation"]: winner_ms}
    own = [ms for name, ms in times.items() if name in PYTORCHS]
    own += [each["default_time_ms"]] if each["observed"] and each["default_time_ms"] else []
    return min(own) / winner_ms if own else None


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def table(rows: Sequence[dict[str, Any]], stream: TextIO, tuned: bool = False, brief: bool = False) -> None:
    """Prints rows for people: who wins, by how much, how sure, what lost; and when `tuned` just now, what it took.

    brief: a line for each problem, without configs and what lost.
    """
    left_out = [each for each in rows if each["status"] == UNREACHED]
    rows = [each for each in rows if each["status"] != UNREACHED]
    for each in left_out:
        stream.write(f"not reached: {each['op']} {each['problem']}: {each['reason']}\n")
    if not rows and not left_out and not tuned:
        stream.write("no verdicts: run `tilebook tune` first\n")
    by_device: dict[str, list[dict[str, Any]]] = {}
    for each in rows:
        by_device.setdefault(each["device"], []).append(each)
    for device, its in sorted(by_device.items()):
        now = [each for each in its if not each.get("skipped")]
        title = f"{'tuned for' if tuned and now else 'verdicts for'} {device}"
        if brief:
            columns = ["winner", "ms", "over default", "over PyTorch", "layer"]
            grid.draw(stream, title, "problem", columns, [_brief(each) for each in its], apart=False)
            continue
        columns = ["ms", "over default", "over PyTorch"]
        grid.draw(stream, title, "problem, winner", columns, [_outcome(each) for each in its])
        if tuned:
            spent = ["tried", "compile s", "measure s", "wait s", "GPU busy", "all s"]
            if now:
                grid.draw(stream, "what it took", "problem, rejected", spent, [_effort(each) for each in now])
    if tuned and rows and all(each.get("skipped") for each in rows):
        stream.write("nothing was searched: all of these have verdicts; --force searches them all the same\n")
    if brief and rows:
        stream.write(BRIEF)
    if any(each["status"] == "predicted" for each in rows):
        stream.write(
            "~ predicted by a performance model from the compiled code; nothing was measured. The default is kept where"
            f" the model promises no more than {DOUBT} times its speed, about as far as it errs. What was measured, in"
            " any layer, is served before what is predicted, and where PyTorch has a kernel of its own no prediction"
            " is: see `tilebook show`.\n"
        )


def _ms(value: float | None, mark: str = "") -> str:
    return "–" if value is None else f"{mark}{value:.4g}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _brief(each: dict[str, Any]) -> tuple[str, list[str]]:
    predicted = each["status"] == "predicted"
    time = _ms(each["predicted_ms"], "~") if predicted else _ms(each["time_ms"])
    over = "default wins" if each["status"] == "default" else _ratio(None if each["observed"] else each["speedup"])
    flags = _flags(each)
    flags = [*flags[1:], "predicted"] if predicted else flags[1:]
    cells = [each["implementation"], time, over, _ratio(over_pytorch(each)), ", ".join(flags)]
    return f"{each['op']} {each['problem']}", cells


def _flags(each: dict[str, Any]) -> list[str]:
    """What is to be known of a verdict, its status first, then its layer."""
    flags = [each["status"], each["layer"]]
    flags += [each["mode"]] if each["mode"] == "eager" else []
    flags += ["observed"] if each["observed"] else []
    flags += ["cut short"] if each["cut_short"] else []
    flags += [f"by {each['made']['by']}"] if each["made"] and "by" in each["made"] else []
    flags += ["stale"] if each["stale"] else []
    flags += [] if each["trusted"] else ["not trusted"]
    flags += ["retired"] if each["retired"] else []
    return flags + ([f"revoked: {quoted(each['revoked'])}"] if each["revoked"] else [])


def _outcome(each: dict[str, Any]) -> tuple[str, list[str]]:
    if each["status"] == "predicted":
        default_ms, winner_ms = _ms(each["predicted_default_ms"], "~"), _ms(each["predicted_ms"], "~")
    else:
        default_ms, winner_ms = _ms(each["default_time_ms"]), _ms(each["time_ms"])
    ratio = {"predicted": "–", "default": "default wins"}.get(each["status"], "")
    if each["status"] == "predicted" and each["predicted_ms"] == each["predicted_default_ms"]:
        ratio = f"default stays\n{_promise(each)}".rstrip()
    if each["status"] == "measured":
        ratio = f"{each['speedup']:.3f}\n[{each['speedup_low']:.3f}, {each['speedup_high']:.3f}]"
    config = " ".join(f"{axis}={value}" for axis, value in each["config"].items())
    others = {name: _ms(time_ms) for name, time_ms in each["others"].items() if name != each["implementation"]}
    default = {} if each["status"] == "default" or each["observed"] else {"default": default_ms}
    times = {each["implementation"]: winner_ms, **default}
    what = (
        f"{each['op']} {each['problem']}\n{each['implementation']} {config}".strip() + f"\n({', '.join(_flags(each))})"
    )
    if each["observed"] and each["status"] == "measured":  # what it is over is PyTorch's own call
        return what, ["\n".join(f"{name} {time}" for name, time in {**times, **others}.items()), "–", ratio]
    return what, [
        "\n".join(f"{name} {time}" for name, time in {**times, **others}.items()),
        ratio,
        _ratio(over_pytorch(each)),
    ]


def _promise(each: dict[str, Any]) -> str:
    """What the model promises of the best that it does not trust, beside the default."""
    best_ms, default_ms = each["predicted_best_ms"], each["predicted_default_ms"]
    return f"best ~{default_ms / best_ms:.3f}" if best_ms and default_ms and best_ms < default_ms else ""


def default_stays(verdict: Shown) -> str:
    """Why a prediction is the default; "" where it is not, or nothing is predicted to be faster."""
    best_ms, its = _best_ms(verdict), verdict.winner.predicted_ms
    if not verdict.winner.default or not best_ms or not its or best_ms >= its:
        return "nothing is predicted to be faster" if verdict.winner.default else ""
    return f"since the best is predicted to be {its / best_ms:.2f}x as fast, and {DOUBT}x is wanted"


def _best_ms(verdict: Shown) -> float | None:
    return min((each.predicted_ms for each in verdict.finalists if each.predicted_ms is not None), default=None)


def _effort(each: dict[str, Any]) -> tuple[str, list[str]]:
    spent, busy = each["seconds"] or {}, each["busy"]
    rejected = ", ".join(f"{count} {reason}" for reason, count in (each["rejected"] or {}).items())
    measured = each["status"] != "predicted"
    shown = ["compiling", "measuring" if measured else "", "waiting" if measured else "", "total"]
    times = [f"{spent[name]:.0f}" if name in spent else "–" for name in shown]
    what = f"{each['op']} {each['problem']}" + (f"\nrejected: {rejected}" if rejected else "")
    tried = "–" if each["tried"] is None else str(each["tried"])
    return what, [tried, *times[:3], "–" if busy is None else f"{busy:.0%}", times[3]]
