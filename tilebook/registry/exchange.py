"""Export and import of a registry in the exchange format, see `lines`.

A file comes from a stranger: every record is checked before it is written, none stays where one is refused, and nothing
in it is ever executed. Records come and go one by one, so that neither way asks for more memory where there are more.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TextIO

from tilebook.registry import incoming, lines
from tilebook.registry.checks import canonical, config_of, quoted, sources
from tilebook.registry.contents import Contents
from tilebook.registry.merging import Choice, note
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.searched import observed
from tilebook.registry.selection import Selection
from tilebook.registry.texts import Record, Written
from tilebook.registry.verdict import Verdict

if TYPE_CHECKING:
    from tilebook.registry.filewriter import FileWriter
    from tilebook.registry.signing import Sign, Signature
    from tilebook.registry.store import Registry

EVERYTHING = Selection()


class Accepted:
    """The verdicts of a file without their evidence, however many there are: for whoever asks what they are made of.

    Of those that have one op, own kernel, winner and winner's source, the first stands for all. Kinds are kept up to
    MOST_KINDS; more than a few are in no file that a tuner wrote.
    """

    MOST_KINDS = 10_000

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, ...], tuple[Verdict, int]] = {}

    def add(self, written: Written) -> None:
        told, winner = written.told, written.finalists[0][0]
        kind = told.op, told.kernel, winner, _sources(told.sources).get(winner, told.kernel)
        if kind in self._kinds:
            first, count = self._kinds[kind]
            self._kinds[kind] = first, count + 1
        elif len(self._kinds) < self.MOST_KINDS:
            verdict = written.verdict
            bare = replace(verdict.winner, samples_ms=(), again=None)
            self._kinds[kind] = replace(verdict, finalists=(bare,), notes={}), 1

    def __iter__(self) -> Iterator[Verdict]:
        for verdict, count in self._kinds.values():
            yield from itertools.repeat(verdict, count)


Allowed = Mapping[str, Mapping[str, frozenset[str]]]
"""Op → implementation → the keys that its configs may have."""


@dataclass
class ImportReport:
    """What an import did. `trials`, `verdicts` and `revocations` count what was written; `unchanged` what was here.

    `skipped` and `replaced` have one line each for a record left out, or for a verdict that took another's place, of
    the first thousand. `accepted` are the file's verdicts but those that were left out for what they are. `trusted`
    says whether what came is, `signature` who signed the file.
    """

    trials: int = 0
    verdicts: int = 0
    revocations: int = 0
    unchanged: int = 0
    skipped: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    accepted: Accepted = field(default_factory=Accepted)
    trusted: bool = False
    signature: Signature | None = None


def export(
    registry: Contents,
    stream: TextIO,
    sign: Sign | None = None,
    selection: Selection = EVERYTHING,
    trials: bool = True,
) -> int:
    """Writes what `gathered` gives; returns how many records that is."""
    return gathered(registry, sign, selection, trials).write(stream)


def gathered(
    registry: Contents, sign: Sign | None = None, selection: Selection = EVERYTHING, trials: bool = True
) -> lines.Gathered:
    """Every intact revocation, verdict and trial that is selected, in an order of their content, to be written when the
    registry is closed: who reads the stream may be slow.

    The same records give the same bytes, whichever registry holds them, and whoever signs them the same but for the
    first line. Misses stay: they say what a user runs. Of what strangers said nothing is signed but trials, for what
    is signed is trusted.
    """
    if sign is not None:
        selection = replace(selection, trusted=True)
    revocations = filter(selection.revocation, registry.revocations())
    with (
        contextlib.closing(registry.each_text(selection)) as verdicts,
        contextlib.closing(registry.each_trial_line(selection)) as tried,
    ):
        return lines.gathered(revocations, verdicts, tried if trials else (), sign)


def load(
    registry: Registry | FileWriter,
    stream: TextIO,
    *,
    allowed: Allowed | None,
    trust: bool | None = False,
    is_problem: Callable[[str, str], bool] = lambda op, key: True,
    max_total: int | None = None,
) -> ImportReport:
    """Imports an exported file in one transaction, or raises RegistryError and changes nothing.

    `allowed` maps each known op to its implementations' permitted config keys: a record with another op or key is
    skipped, and one whose problem is none of its op by `is_problem`. An implementation that is not here, as one of
    another version, may have any config: nothing runs it. None lifts these limits, for files one wrote oneself.
    Verdicts and revocations arrive with origin "imported" and trusted as `trust` says, or, where that is None, if the
    file is signed by a key that the user trusts: a stranger's revocations make nothing wrong, but could make everything
    slow. Conflicts of verdicts are resolved by evidence, see `import_rule`;
    revocations add up. `max_total` limits the characters read.
    """
    source = lines.opened(stream, origin="imported", trusted=trust, max_total=max_total, decode=incoming.decoded)
    report = ImportReport(trusted=source.trusted, signature=source.signature)
    trials = 0

    def records() -> Generator[Record, None, None]:
        nonlocal trials
        limits = None if allowed is None else _Limits(allowed, is_problem)
        with contextlib.closing(source.records):
            for number, record in source.records:
                if limits is not None and (refusal := limits.refusal(record)):
                    note(report.skipped, f"line {number}: {refusal}")
                    continue
                if isinstance(record, Written):
                    report.accepted.add(record)
                trials += isinstance(record, Trial)
                yield record

    with contextlib.closing(records()) as found:
        merged = registry.pour(found, rule=import_rule, origin="imported")
    report.trials, report.verdicts, report.revocations = merged.trials, merged.verdicts, merged.revocations
    report.unchanged = merged.unchanged + trials - merged.trials
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

    What may be served goes before what may not, since a stranger's claims are claims only; then measurements, those
    of a tune before what a program has observed, one's own, the tighter interval, more samples, the newer.
    """
    return (
        verdict.trusted,
        verdict.measured,
        not observed(verdict),
        verdict.origin != "imported",
        0.0 if verdict.interval is None else verdict.interval.low - verdict.interval.high,
        sum(len(each.samples_ms) for each in verdict.finalists),
        verdict.created_at,
        verdict.sha256,
    )


_REASONS = (
    "a trusted verdict stands against one that is not",
    "a measurement stands against a prediction",
    "a measurement stands against what a program has observed",
    "one's own verdict stands against an imported one",
    "the tighter of two intervals stands",
    "of two verdicts, the one with more samples stands",
    "the newer of two verdicts stands",
    "of two alike, the same one stands everywhere",
)


class _Limits:
    """What records may be about, and their configs have."""

    def __init__(self, allowed: Allowed, is_problem: Callable[[str, str], bool]) -> None:
        self._allowed = allowed
        self._is_problem = lru_cache(1_024)(is_problem)  # a problem has trials, and verdicts on several GPUs
        self._known = lru_cache(1_024)(self._unknown)  # and thousands of finalists are of a few configs

    def refusal(self, record: Record) -> str:
        """Why a record is skipped; "" where it is not."""
        told = record.told if isinstance(record, Written) else record
        op = told.op
        if op not in self._allowed and ":" not in op:  # of somebody else's kernel only what it has itself ever runs
            return f"unknown op {op}"
        if not isinstance(told, Revocation) and not self._is_problem(op, told.problem):
            return f"{op} has no problem {quoted(told.problem)}"
        # A verdict's finalists are what dispatch falls back on, so their configs are held to the same list.
        if isinstance(record, Written):
            return next(filter(None, (self._known(op, each[0], each[1]) for each in record.finalists)), "")
        config = record.texts[0] if isinstance(record, Trial) else canonical(record.config)
        return self._known(op, record.implementation, config)

    def _unknown(self, op: str, implementation: str, config: str) -> str:
        keys, known = config_of(config).keys(), self._allowed.get(op, {}).get(implementation)
        if known is None or keys <= known:
            return ""
        return f"{op} has no config key {quoted(sorted(keys - known))} for {implementation}"


@lru_cache(1_024)  # a few texts, which every verdict repeats
def _sources(text: str) -> Mapping[str, str]:
    return sources(json.loads(text))
