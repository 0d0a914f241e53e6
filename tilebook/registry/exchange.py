"""The exchange format: JSON Lines, a header and one self-describing record a line.

    {"format":"tilebook-registry","records":3,"sha256":"...","version":3}
    {"type":"revocation","op":"attention_fwd",...,"sha256":"..."}
    {"type":"verdict","op":"attention_fwd",...,"sha256":"..."}
    {"type":"trial",...,"sha256":"..."}

The header's digest is over the record lines as written, each with its newline; a record's is over its content. A file
comes from a stranger: all of it is checked before any of it is written, and nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from tilebook.errors import RegistryError
from tilebook.registry import legacy
from tilebook.registry.checks import Json, canonical, quoted
from tilebook.registry.codec import revocation_from, trial_from, verdict_from
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.store import Choice, Registry
from tilebook.registry.verdict import Verdict

FORMAT = "tilebook-registry"
# Version 2 added revocations, version 3 the finalists of verdicts, which were free-form evidence before. A file is
# written as the oldest version that can say what is in it.
VERSION = 3
MAX_LINE = 2 * 1024 * 1024  # characters; a record's own limits keep its line below this
MAX_TOTAL = 256 * 1024 * 1024  # characters


@dataclass
class ImportReport:
    """What an import did. `trials`, `verdicts` and `revocations` count what was written; `unchanged` what was here.

    `skipped` and `replaced` have one line each for a record left out, or for a verdict that took another's place.
    """

    trials: int = 0
    verdicts: int = 0
    revocations: int = 0
    unchanged: int = 0
    skipped: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)


def export(registry: Registry, stream: TextIO) -> int:
    """Writes every intact revocation, verdict and trial, in an order of their content, and returns how many.

    The same records give the same bytes, whichever registry holds them. Misses stay: they say what a user runs.
    """
    revoked = [_line("revocation", revocation.portable()) for revocation in registry.revocations()]
    verdicts = [_line("verdict", verdict.portable()) for verdict in registry.verdicts()]
    lines = revoked + verdicts
    trials = [(t.op, t.problem, t.created_at, _line("trial", t.content())) for t in registry.trials()]
    lines += [line for *_, line in sorted(trials)]
    whole = hashlib.sha256()
    for line in lines:
        whole.update(line.encode())
    version = 3 if verdicts else 2 if revoked else 1
    header: dict[str, Json] = {"format": FORMAT, "version": version, "records": len(lines), "sha256": whole.hexdigest()}
    stream.write(canonical(header) + "\n")
    stream.writelines(lines)
    return len(lines)


def load(
    registry: Registry,
    stream: TextIO,
    *,
    allowed: Mapping[str, frozenset[str]] | None,
    trust: bool = False,
    max_total: int = MAX_TOTAL,
) -> ImportReport:
    """Imports an exported file in one transaction, or raises RegistryError and changes nothing.

    `allowed` maps each known op to its permitted config keys; a record with another op or key is skipped. None lifts
    that limit and is for files one wrote oneself. Verdicts and revocations arrive with origin "imported" and trusted as
    `trust` says: a stranger's revocations make nothing wrong, but could make everything slow. Conflicts of verdicts are
    resolved by evidence, see `import_rule`; revocations add up. `max_total` limits the characters read.
    """
    report = ImportReport()
    trials: list[Trial] = []
    verdicts: list[Verdict] = []
    revocations: list[Revocation] = []
    for number, version, data in _records(stream, max_total):
        try:
            record = _decode(data, version, trust)
        except (ValueError, TypeError, RecursionError) as error:
            raise _malformed(number, str(error)) from error
        refusal = _refusal(record, allowed)
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


def _line(kind: str, content: Mapping[str, Any]) -> str:
    return canonical({**content, "type": kind, "sha256": _sha256(content)}) + "\n"


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _malformed(number: int, why: str) -> RegistryError:
    return RegistryError(f"line {number} of the import: {why}")


def _records(stream: TextIO, max_total: int) -> Iterable[tuple[int, int, dict[str, Any]]]:
    """Yields (line number, version, object); the header's promises are checked when the last line has been seen."""
    head = _parse(1, _read_line(stream, 1, max_total))
    if head.get("format") != FORMAT:
        raise _malformed(1, "this is not a tilebook export")
    if type(head.get("version")) is not int or not 1 <= head["version"] <= VERSION:
        raise _malformed(1, f"export version {quoted(head.get('version'))} is not 1 to {VERSION}")
    if head.keys() != {"format", "version", "records", "sha256"} or type(head["records"]) is not int:
        raise _malformed(1, "the header's fields are wrong")
    whole = hashlib.sha256()
    left, number = max_total, 1
    while line := _read_line(stream, number + 1, left):
        number += 1
        left -= len(line)
        if number - 1 > head["records"]:
            raise _malformed(number, f"the header promised {head['records']} records, and there are more")
        whole.update(line.rstrip("\r\n").encode() + b"\n")
        data = _parse(number, line)
        if head["version"] == 1 and data.get("type") == "revocation":
            raise _malformed(number, "version 1 of the format has no revocations")
        yield number, head["version"], data
    if number - 1 != head["records"]:
        raise _malformed(number, f"the header promised {head['records']} records, and there are {number - 1}")
    if whole.hexdigest() != head["sha256"]:
        raise _malformed(1, "the digest of the records is wrong")


def _read_line(stream: TextIO, number: int, left: int) -> str:
    try:
        line = stream.readline(MAX_LINE + 1)
        line.encode()
    except UnicodeError as error:
        raise _malformed(number, "the text is not UTF-8") from error
    if len(line) > MAX_LINE:
        raise _malformed(number, f"longer than {MAX_LINE} characters")
    if len(line) > left:
        raise _malformed(number, "the file is too large")
    return line


def _parse(number: int, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError as error:
        raise _malformed(number, "nested too deep") from error
    except ValueError as error:
        raise _malformed(number, f"not JSON: {error}") from error
    if type(data) is not dict:
        raise _malformed(number, "not a JSON object")
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _decode(data: dict[str, Any], version: int, trust: bool) -> Trial | Verdict | Revocation:
    kind, claimed = data.pop("type", None), data.pop("sha256", None)
    record: Trial | Verdict | Revocation
    if kind == "trial":
        record = trial_from(data)
    elif kind == "verdict":
        content = legacy.lifted(data) if version < 3 else data
        record = verdict_from(content, origin="imported", trusted=trust)
    elif kind == "revocation":
        record = revocation_from(data, origin="imported", trusted=trust)
    else:
        raise ValueError(f"unknown record type {quoted(kind)}")
    if claimed != _sha256(data):
        raise ValueError("the record's digest is wrong")
    return record


def _refusal(record: Trial | Verdict | Revocation, allowed: Mapping[str, frozenset[str]] | None) -> str:
    if allowed is None:
        return ""
    if record.op not in allowed:
        return f"unknown op {record.op}"
    # A verdict's finalists are what dispatch falls back on, so their configs are held to the same list.
    configs = [config for _, config in record.ranking()] if isinstance(record, Verdict) else [record.config]
    unknown = sorted({key for config in configs for key in config} - allowed[record.op])
    return f"{record.op} has no config key {quoted(unknown)}" if unknown else ""
