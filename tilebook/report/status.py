"""What model code has asked for on a GPU model, and how much of it verdicts cover by now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilebook import device as devices
from tilebook import op as ops
from tilebook import registry as store
from tilebook.device import Device
from tilebook.dispatch import Choice, Snapshot
from tilebook.op import Op, Problem, UsageError
from tilebook.report.rows import row


@dataclass(frozen=True)
class Asked:
    """A problem that model code asked for when no verdict covered it, and what would run now.

    calls: so far. time_ms: of one call, by estimate.
    """

    op: Op[Any]
    problem: Problem
    calls: int
    time_ms: float
    choice: Choice

    @property
    def weight_s(self) -> float:
        """GPU time of all calls, by estimate."""
        return self.calls * self.time_ms / 1e3

    @property
    def exact(self) -> bool:
        """Has it a verdict of its own by now?"""
        return self.choice.source == "exact"

    @property
    def covered(self) -> bool:
        """Has it one that was measured?"""
        return self.exact and self.choice.verdict is not None and self.choice.verdict.measured

    @property
    def tunable(self) -> bool:
        """Does our kernel run it there?"""
        gpu, space = self.choice.gpu, self.op.tunable.space
        return gpu is not None and space is not None and self.op.tunable.can_run(self.problem, gpu)


def asked(gpu: Device, registry: str | None = None) -> list[Asked]:
    """The ledger for a GPU model, heaviest first. Ops and fields that this version does not know are left out."""
    snapshot, known = Snapshot(gpu, registry), ops.ops()
    layers = store.Layers.default(registry)
    found = []
    for miss in layers.misses(store.Device(*gpu.identity)):
        if miss.op in known:
            try:
                problem = known[miss.op].problem.from_key(miss.problem)
            except (TypeError, ValueError):
                continue
            choice = snapshot.choose(known[miss.op], problem)
            found.append(Asked(known[miss.op], problem, miss.calls, miss.time_ms, choice))
    return found


def target(gpu: str | None) -> Device:
    """The GPU here, where it is of that model or none is named; else the catalogue's. Raises UsageError without either.

    What is stored of the GPU here bears its own name, which may be longer than the catalogue's.
    """
    named = None if gpu is None else devices.find(gpu)
    if devices.present() and (named is None or devices.is_here(named, devices.current())):
        return devices.current()
    if named is None:
        raise UsageError("there is no GPU here: name one with --gpu")
    return named


def status(gpu: str | None, registry: str | None) -> tuple[str, dict[str, Any]]:
    """A text for people and the same as data: verdicts by kind, what was asked for, the share of it that is covered."""
    device = target(gpu)
    layers = store.Layers.default(registry)
    verdicts = [row(verdict, layer) for layer, verdict in layers.verdicts(device=store.Device(*device.identity))]
    problems = list(layers.problems)
    if registry:
        layers.demand_explicit()
    found = asked(device, registry)
    total_s = sum(each.weight_s for each in found)
    covered_s = sum(each.weight_s for each in found if each.covered)
    data: dict[str, Any] = {
        "device": device.name,
        "verdicts": dict(Counter(each["status"] for each in verdicts if not each["retired"])),
        "layers": dict(Counter(each["layer"] for each in verdicts if not each["retired"])),
        "stale": sum(each["stale"] for each in verdicts if not each["retired"]),
        "retired": sum(each["retired"] for each in verdicts),
        "not_trusted": sum(not each["trusted"] for each in verdicts),
        "asked_s": total_s,
        "covered": covered_s / total_s if total_s else None,
        "asked": [_shown(each, total_s) for each in found],
        "problems": problems,
    }
    return "\n".join(_lines(data)), data


def _shown(each: Asked, total_s: float) -> dict[str, Any]:
    choice = each.choice
    return {
        "op": each.op.name,
        "problem": f"{each.problem.label} {getattr(each.problem, 'dtype', '')}".strip(),
        "calls": each.calls,
        "time_ms": each.time_ms,
        "share": each.weight_s / total_s if total_s else 0.0,
        "covered": each.covered,
        "tunable": each.tunable,
        "source": "predicted" if each.exact and not each.covered else choice.source,
        "runs": f"{choice.implementation.name} {choice.config or ''}".strip(),
    }


_MOST = 15  # problems in the text; the data has them all


def _lines(data: dict[str, Any]) -> Sequence[str]:
    def counted(counts: dict[str, int]) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"

    lines = [data["device"], f"  verdicts  {counted(data['verdicts'])}; by layer: {counted(data['layers'])}"]
    lines[-1] += f"; {data['stale']} stale" if data["stale"] else ""
    lines[-1] += f"; {data['not_trusted']} not trusted" if data["not_trusted"] else ""
    lines[-1] += f"; {data['retired']} more retired: of kernels as they were" if data["retired"] else ""
    if not data["asked"]:
        return [*lines, "  asked     no problem that had no verdict, by the registries that programs here can write to"]
    spent = f"{data['asked_s']:.3g} s of GPU time by estimate, {data['covered']:.0%} of it covered by now"
    lines.append(f"  asked     {len(data['asked'])} problems that had no verdict: {spent}")
    for each in data["asked"][:_MOST]:
        now = "covered" if each["covered"] else each["source"]
        lines.append(
            f"  {each['share']:6.1%}  {each['calls']:>9,} × {each['time_ms']:.3g} ms  {each['op']} {each['problem']}"
            f"  ({now}: {each['runs']})"
        )
    if len(data["asked"]) > _MOST:
        lines.append(f"          and {len(data['asked']) - _MOST} more")
    if any(each["tunable"] and not each["covered"] for each in data["asked"]):
        lines.append("  tilebook tune --misses works through what is not covered, heaviest first")
    return lines
