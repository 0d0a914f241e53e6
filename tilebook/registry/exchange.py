"""Export and import of a registry in the exchange format, see `lines`.

A file comes from a stranger: all of it is checked before any of it is written, and nothing in it is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from tilebook.registry import lines
from tilebook.registry.checks import quoted
from tilebook.registry.lines import MAX_TOTAL
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.store import Choice, Registry
from tilebook.registry.verdict import Verdict


@dataclass
class ImportReport:
    """What an import did. `trials`, `verdicts` and `revocations` count what was written; `unchanged` what was here.

    `skipped` and `replaced` have one line each for a record left out, or for a verdict that took another's place.
    `accepted` are the file's verdicts but those that were left out for what they are.
    """

    trials: int = 0
    verdicts: int = 0
    revocations: int = 0
    unchanged: int = 0
    skipped: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    accepted: list[Verdict] = field(default_factory=list)


def export(registry: Registry, stream: TextIO) -> int:
    """Writes every intact revocation, verdict and trial, in an order of their content, and returns how many.

    The same records give the same bytes, whichever registry holds them. Misses stay: they say what a user runs.
    """
    found = lines.written(registry.revocations(), registry.verdicts(), registry.trials())
    stream.writelines(found)
    return len(found) - 1


def load(
    registry: Registry,
    stream: TextIO,
    *,
    allowed: Mapping[str, frozenset[str]] | None,
    trust: bool = False,
    is_problem: Callable[[str, str], bool] = lambda op, key: True,
    max_total: int = MAX_TOTAL,
) -> ImportReport:
    """Imports an exported file in one transaction, or raises RegistryError and changes nothing.

    `allowed` maps each known op to its permitted config keys: a record with another op or key is skipped, and one whose
    problem is none of its op by `is_problem`. None lifts these limits and is for files one wrote oneself. Verdicts and
    revocations arrive with origin "imported" and trusted as `trust` says: a stranger's revocations make nothing wrong,
    but could make everything slow. Conflicts of verdicts are resolved by evidence, see `import_rule`; revocations add
    up. `max_total` limits the characters read.
    """
    report = ImportReport()
    trials: list[Trial] = []
    verdicts = report.accepted
    revocations: list[Revocation] = []
    for number, record in lines.read(stream, origin="imported", trusted=trust, max_total=max_total):
        refusal = _refusal(record, allowed, is_problem)
        if refusal:
            report.skipped.append(f"line {number}: {refusal}")
        elif isinstance(record, Trial):
            trials.append(record)
        elif isinstance(record, Revocation):
            revocations.append(record)
        else:
            verdicts.append(record)
    merged = registry.merge(trials, verdicts, revocations, rule=import_rule, origin="imported")
    report.trials, report.verdicts, report.revocations = merged.trials, merged.verdicts, merged.revocations
    report.unchanged = merged.unchanged + len(trials) - merged.trials
    report.skipped += merged.kept
    report.replaced = merged.replaced
    return report


def import_rule(existing: Verdict, new: Verdict) -> Choice:
    """Between a verdict that is here and an imported one the stronger stands, whichever came first: see `strength`."""
    mine, theirs = strength(existing), strength(new)
    place = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), len(_REASONS) - 1)
    return Choice(theirs > mine, _REASONS[place])


def strength(verdict: Verdict) -> tuple[Any, ...]:
    """A total order of verdicts on one key, so that what is left of many does not depend on who was merged first.

    What may be served goes before what may not, since a stranger's claims are claims only; then measurements, one's
    own, the tighter interval, more samples, the newer.
    """
    return (
        verdict.trusted,
        verdict.measured,
        verdict.origin != "imported",
        0.0 if verdict.interval is None else verdict.interval.low - verdict.interval.high,
        sum(len(each.samples_ms) for each in verdict.finalists),
        verdict.created_at,
        verdict.sha256,
    )


_REASONS = (
    "a trusted verdict stands against one that is not",
    "a measurement stands against a prediction",
    "one's own verdict stands against an imported one",
    "the tighter of two intervals stands",
    "of two verdicts, the one with more samples stands",
    "the newer of two verdicts stands",
    "of two alike, the same one stands everywhere",
)


def _refusal(
    record: Trial | Verdict | Revocation,
    allowed: Mapping[str, frozenset[str]] | None,
    is_problem: Callable[[str, str], bool],
) -> str:
    if allowed is None:
        return ""
    if record.op not in allowed:
        return f"unknown op {record.op}"
    if not isinstance(record, Revocation) and not is_problem(record.op, record.problem):
        return f"{record.op} has no problem {quoted(record.problem)}"
    # A verdict's finalists are what dispatch falls back on, so their configs are held to the same list.
    configs = [config for _, config in record.ranking()] if isinstance(record, Verdict) else [record.config]
    unknown = sorted({key for config in configs for key in config} - allowed[record.op])
    return f"{record.op} has no config key {quoted(unknown)}" if unknown else ""
