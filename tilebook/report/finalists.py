"""What a verdict says of the very candidate that would run, and of those before it that would not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from tilebook.device import Device, package_version
from tilebook.dispatch.snapshot import CANNOT
from tilebook.op import Config, Implementation, Problem
from tilebook.registry.searched import observed
from tilebook.registry.served import Served
from tilebook.registry.verdict import Finalist, Verdict

if TYPE_CHECKING:
    from tilebook.dispatch import Choice, Snapshot


class _Named(Protocol):
    """What of a finalist says which candidate it is, whole or as served."""

    @property
    def implementation(self) -> str: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


def written(config: Mapping[str, Any]) -> str:
    """A config for people."""
    return " ".join(f"{axis}={value}" for axis, value in config.items())


def running(verdict: Verdict, choice: Choice) -> Finalist | None:
    """The finalist that the choice is; None where it is none of them."""
    return next((each for each in verdict.finalists if _is(each, choice)), None)


def _is(finalist: _Named, choice: Choice) -> bool:
    if finalist.implementation != choice.implementation.name:
        return False
    # What won before it had a space runs as it does by default, see `Snapshot._feasible`.
    return choice.config is None or not finalist.config or Config(finalist.config) == choice.config


def passed_over(snapshot: Snapshot, choice: Choice) -> Iterator[dict[str, Any]]:
    """The measured finalists that come before the choice in its verdict, or in one on just this problem that nothing
    runs of, and why each does not run. Without those that are revoked."""
    verdict = choice.verdict or snapshot.exact(choice.implementation.op, choice.problem)
    if verdict is None or not verdict.measured:
        return
    for each in verdict.finalists:
        if choice.verdict is not None and _is(each, choice):
            return
        why = _why_not(snapshot, choice, verdict, each)
        if why:
            what = {"implementation": each.implementation, "config": dict(each.config), "time_ms": each.time_ms}
            yield {**what, "reason": why}


def _why_not(snapshot: Snapshot, choice: Choice, verdict: Served, finalist: Any) -> str:
    """Why dispatch passes a finalist over, in the order in which it asks; "" where it is revoked."""
    op, problem = choice.implementation.op, choice.problem
    found = snapshot.judged(op, problem, verdict, finalist)
    if isinstance(found, str):
        return _cannot(op.implementations[finalist.implementation], problem, snapshot.gpu) if found == CANNOT else found
    implementation = found[0]
    if choice.source != "nearest" and not snapshot.counts(implementation, problem, verdict):
        return "its lead over PyTorch's own call is too thin to count here"
    return ""


def _cannot(implementation: Implementation, problem: Problem, gpu: Device) -> str:
    package = implementation.external
    if package and package_version(package) == "unknown":
        return f"{package} is not installed here"
    if not implementation.available(gpu):
        return "it is not available here"
    if not implementation.supports(problem):
        return "it does not take this problem"
    return "its results do not repeat bit for bit"


def evidence(verdict: Verdict, runs: Finalist | None) -> tuple[str, dict[str, Any]]:
    """What was measured of the finalist that runs, and of the best of each other implementation: for people, as data.

    runs: None is the winner.
    """
    runs = verdict.winner if runs is None else runs
    if runs.time_ms is None:
        default_ms = verdict.notes.get("predicted_default_ms") or 0.0
        told = f"never; predicted ~{runs.predicted_ms or 0.0:.4g} ms, default ~{default_ms:.4g} ms"
        return told, {"time_ms": None, "predicted_ms": runs.predicted_ms, "speedup": None, "others": {}}
    interval, default_ms = verdict.interval if runs is verdict.winner else runs.speedup, verdict.default_time_ms or 0.0
    others: dict[str, float] = {}
    for each in verdict.finalists:  # best first
        if each.implementation != runs.implementation and each.time_ms is not None and not each.default:
            others.setdefault(each.implementation, each.time_ms)
    base = "PyTorch's own call" if observed(verdict) else "the default config"
    if runs.default:
        ratio = base
    elif interval is None:
        ratio = f"{default_ms / runs.time_ms:.3f}x {base} ({default_ms:.4g} ms)"
    else:
        ratio = f"{interval.value:.3f}x [{interval.low:.3f}, {interval.high:.3f}] {base} ({default_ms:.4g} ms)"
    listed = "".join(f"; {name} {ms:.4g} ms" for name, ms in others.items())
    if runs is verdict.winner and others and min(others.values()) < runs.time_ms:
        listed += " (what took less time was its equal within the noise, or was not confirmed)"
    data = {"time_ms": runs.time_ms, "predicted_ms": None, "others": others}
    return f"{runs.time_ms:.4g} ms, {ratio}{listed}", {**data, "speedup": None if interval is None else interval.value}
