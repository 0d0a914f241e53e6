"""JSON content back to records, exactly: what is decoded must encode to the very same canonical text.

That one comparison refuses unknown and missing fields, `1` or `true` where `1.0` belongs, a second spelling of a time,
and text that a record would have had to clean. It serves rows of the database and lines of a stranger's file alike.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from tilebook.registry import checks
from tilebook.registry.checks import canonical, parse_time, quoted
from tilebook.registry.records import Device, Environment, Miss, Revocation, Trial
from tilebook.registry.verdict import Finalist, Speedup, Verdict


def trial_from(data: object) -> Trial:
    """Raises ValueError."""
    trial = trial_like(data)
    if canonical(data) != trial.text:  # type: ignore[arg-type]
        raise ValueError("the trial is not in its normal form")
    return trial


def trial_like(data: object) -> Trial:
    """As `trial_from`, for whoever compares the trial's text with the one that this is: it may say it otherwise."""
    fields = _fields(data, "trial", Trial)
    fields["device"] = _device(fields["device"])
    fields["environment"] = _environment(canonical(fields["environment"]))
    if type(fields["samples_ms"]) is not list:
        raise ValueError(f"samples_ms is not a list: {quoted(fields['samples_ms'])}")
    fields["samples_ms"] = tuple(fields["samples_ms"])
    fields["created_at"] = parse_time(fields["created_at"], "created_at")
    return Trial(**fields)


def verdict_from(data: object, *, origin: str, trusted: bool) -> Verdict:
    """`data` is a verdict's portable content; raises ValueError."""
    verdict = verdict_like(data, origin=origin, trusted=trusted)
    _same(data, verdict.portable(), "verdict")
    return verdict


def verdict_like(data: object, *, origin: str, trusted: bool) -> Verdict:
    """As `verdict_from`, for whoever compares the verdict's text with the one that this is: it may say it otherwise."""
    fields = _fields(data, "verdict", Verdict, without=("origin", "trusted"))
    fields["device"] = _device(fields["device"])
    fields["environment"] = _environment(canonical(fields["environment"]))
    if type(fields["finalists"]) is not list:
        raise ValueError(f"finalists are not a list: {quoted(fields['finalists'])}")
    fields["finalists"] = tuple(map(Finalist.of, fields["finalists"]))
    fields["interval"] = Speedup.of(fields["interval"])
    fields["created_at"] = parse_time(fields["created_at"], "created_at")
    return Verdict(**fields, origin=origin, trusted=trusted)


def revocation_from(data: object, *, origin: str, trusted: bool) -> Revocation:
    """`data` is a revocation's portable content; raises ValueError."""
    unsaid = () if checks.is_mapping(data) and data.get("made") else ("made",)  # as of old
    fields = _fields(data, "revocation", Revocation, without=("origin", "trusted", *unsaid))
    fields["created_at"] = parse_time(fields["created_at"], "created_at")
    revocation = Revocation(**fields, origin=origin, trusted=trusted)
    _same(data, revocation.portable(), "revocation")
    return revocation


def miss_from(data: object) -> Miss:
    """Raises ValueError."""
    fields = _fields(data, "miss", Miss)
    fields["device"] = _device(fields["device"])
    fields["last_seen"] = parse_time(fields["last_seen"], "last_seen")
    miss = Miss(**fields)
    _same(data, miss.content(), "miss")
    return miss


def _device(data: object) -> Device:
    fields = _fields(data, "device", Device)
    return _known_device(*(fields[name] for name in Device.__dataclass_fields__))


@lru_cache(256, typed=True)  # few, and every record names one
def _known_device(name: str, arch: str, sm_count: int) -> Device:
    return Device(name, arch, sm_count)


@lru_cache(256)
def _environment(text: str) -> Environment:
    return Environment(json.loads(text))


def _fields(data: object, what: str, record: type[Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    names: tuple[str, ...] = _names(record, without)  # type: ignore[arg-type]  # classes are hashable
    return checks.fields(data, what, names)


@lru_cache
def _names(record: Any, without: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in record.__dataclass_fields__ if name not in without)


def _same(data: object, content: object, what: str) -> None:
    if canonical(data) != canonical(content):  # type: ignore[arg-type]
        raise ValueError(f"the {what} is not in its normal form")
