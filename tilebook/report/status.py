"""What model code has asked for on a GPU model, and how much of it verdicts cover by now."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tilebook import inventory, machine
from tilebook import registry as store
from tilebook.errors import UsageError
from tilebook.registry import DenyList, Miss
from tilebook.registry.current import may_run, stands
from tilebook.registry.overview import Candidate, Shown
from tilebook.registry.verdict import Finalist
from tilebook.report.rows import deny_list, label, row


@dataclass(frozen=True)
class Asked:
    """A problem that model code asked for when no verdict covered it, and what a verdict of its own says by now.

    runs: the best of the verdict that may run; None where there is none.
    """

    miss: Miss
    verdict: Shown | None = None
    runs: Finalist | Candidate | None = None

    @property
    def weight_s(self) -> float:
        """GPU time of all calls, by estimate."""
        return self.miss.calls * self.miss.time_ms / 1e3

    @property
    def covered(self) -> bool:
        """Has it a verdict that was measured?"""
        return self.runs is not None and self.verdict is not None and self.verdict.measured

    @property
    def source(self) -> str:
        """Of which kind the verdict is."""
        return "none" if self.runs is None else "exact" if self.covered else "predicted"


def asked(misses: Iterable[Miss], verdicts: Iterable[Shown], denied: DenyList) -> list[Asked]:
    """The ledger, and what verdicts say of it. Ops and fields that this version does not know are left out."""
    by_problem = dict[tuple[str, str], list[Shown]]()
    for verdict in verdicts:
        by_problem.setdefault((verdict.op, verdict.problem), []).append(verdict)
    found = []
    for miss in misses:
        if not _is_problem(miss):
            continue
        answers = ((v, _runs(v, denied)) for v in by_problem.get((miss.op, miss.problem), ()))
        serving = ((v, winner) for v, winner in answers if winner is not None)
        found.append(Asked(miss, *next(serving, (None, None))))
    return found


def _is_problem(miss: Miss) -> bool:
    try:
        inventory.get(miss.op).problem.from_key(miss.problem)
    except (TypeError, ValueError):
        return False
    return True


def _runs(verdict: Shown, denied: DenyList) -> Finalist | Candidate | None:
    """The best of a verdict that is what was measured and is not revoked; None of one that may not be served."""
    op = inventory.get(verdict.op)
    unknown = not op.digest  # of somebody else's kernel: whoever serves it looks at the source
    if not verdict.trusted or not (unknown or stands(verdict, op.digest)):
        return None
    for each in verdict.finalists:
        name = each.implementation
        digest = verdict.source_of(name) if unknown else op.digest_of(name)
        if not may_run(verdict, name, digest):
            continue
        if denied.find(verdict.op, digest or "", verdict.device.arch, name, each.config) is None:
            return each
    return None


def status(gpu: str | None, registry: str | None) -> tuple[str, dict[str, Any]]:
    """A text for people and the same as data: verdicts by kind, what was asked for, the share of it that is covered.

    Raises UsageError where there is no GPU here and none was named.
    """
    identity = machine.target(gpu)
    if identity is None:
        raise UsageError("there is no GPU here: name a model, as in --gpu H200")
    device, layers = store.Device(*identity), store.Layers.default(registry)
    found, revocations = layers.overviews(device=device)
    problems = list(layers.problems)
    if registry:
        layers.demand_explicit()
    verdicts = [row(verdict, layer) for layer, verdict in found]
    served = [each for each in verdicts if not each["retired"]]
    denied = deny_list(revocations)
    wanted = asked(layers.misses(device), (verdict for _, verdict in found), denied)
    total_s = sum(each.weight_s for each in wanted)
    covered_s = sum(each.weight_s for each in wanted if each.covered)
    data: dict[str, Any] = {
        "device": device.name,
        "verdicts": dict(Counter(each["status"] for each in served)),
        "layers": dict(Counter(each["layer"] for each in served)),
        "stale": sum(each["stale"] for each in served),
        "retired": len(verdicts) - len(served),
        "not_trusted": sum(not each["trusted"] for each in verdicts),
        "asked_s": total_s,
        "covered": _part(covered_s, total_s) if total_s else None,
        "asked": [_shown(each, total_s) for each in wanted],
        "problems": problems,
    }
    return "\n".join(_lines(data)), data


def _shown(each: Asked, total_s: float) -> dict[str, Any]:
    runs = each.runs
    return {
        "op": each.miss.op,
        "problem": label(each.miss.op, each.miss.problem),
        "calls": each.miss.calls,
        "time_ms": each.miss.time_ms,
        "share": _part(each.weight_s, total_s),
        "covered": each.covered,
        "source": each.source,
        "runs": None if runs is None else {"implementation": runs.implementation, "config": dict(runs.config)},
    }


def _part(seconds: float, total_s: float) -> float:
    """What part of the whole it is; none of one that has no end, as a stranger's ledger may say."""
    part = seconds / total_s if total_s else 0.0
    return part if math.isfinite(part) else 0.0


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
        lines.append(
            f"  {each['share']:6.1%}  {each['calls']:>9,} × {each['time_ms']:.3g} ms  {each['op']} {each['problem']}"
            f"  ({_now(each)})"
        )
    if len(data["asked"]) > _MOST:
        lines.append(f"          and {len(data['asked']) - _MOST} more")
    if not all(each["covered"] for each in data["asked"]):
        lines.append("  tilebook tune --misses works through what is not covered, heaviest first")
        lines.append("  tilebook explain OP --shape SHAPE says what runs until then")
    return lines


def _now(each: dict[str, Any]) -> str:
    if each["runs"] is None:
        return "no verdict"
    config = " ".join(f"{axis}={value}" for axis, value in each["runs"]["config"].items())
    return f"{'covered' if each['covered'] else 'predicted'}: {each['runs']['implementation']} {config}".rstrip()
