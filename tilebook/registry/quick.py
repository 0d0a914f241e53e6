"""A verdict's texts from its columns, of a row or of a line of the exchange format, without a record being made.

Whatever this lets pass is, to the character, what would be written of the record: every field has been looked at as the
record would look at it, texts that many records share once for all. What it cannot tell at a glance it leaves to
whoever makes the record, and so it may be stricter than a record is, and never looser.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from tilebook.registry import checks
from tilebook.registry.checks import DAMAGE, canonical, time_text
from tilebook.registry.notes import are_notes
from tilebook.registry.records import Device, Environment
from tilebook.registry.texts import NONE, Columns, Three, Written, finalist_text, numbers, text_of
from tilebook.registry.verdict import MODES, MOST_FINALISTS, Again, VerdictStatus

_SHARED = 1_024
"""Texts of each kind that are remembered."""

_BRIEF = 4_096
"""Characters of a text that is remembered: a stranger's may be long."""


class Line(NamedTuple):
    """A verdict's line, and what a selection asks of a verdict."""

    text: str
    op: str
    problem: str
    device: Device
    created_at: datetime
    origin: str
    measured: bool
    trusted: bool
    kernel: str

    @property
    def place(self) -> tuple[str, str, str, str, int, str]:
        """`Verdict.place`."""
        device = self.device
        return self.op, self.problem, device.name, device.arch, device.sm_count, self.kernel

    @classmethod
    def of(cls, written: Written) -> Line:
        its = written.told
        at = checks.parse_time(its.created_at, "created_at")
        told = its.op, its.problem, its.device, at, its.origin, written.measured, its.trusted, its.kernel
        return cls(written.line, *told)


def quick(row: Sequence[Any], finalists: Sequence[Sequence[Any]]) -> Line | None:
    """Of the columns that `reading` asks for, finalists in the order of their places; None where that is in doubt."""
    try:
        found = whole(row, finalists)
    except DAMAGE:
        return None
    if found is None or (found.sha256, found.served) != (row[1], row[2]):
        return None
    return Line.of(found)


def whole(row: Sequence[Any], finalists: Sequence[Sequence[Any]]) -> Written | None:
    """Of the same columns, whose digests are not looked at. What is in doubt is None, or raises one of DAMAGE."""
    _, _, _, op, problem, name, arch, sm_count, versions, kernel_op, kernel, status, mode, *rest = row
    default_time_ms, value, low, high, sources, origin, trusted, at, notes = rest
    measured, interval, ours = _measured(status), _three(value, low, high), _number(default_time_ms)
    texts: list[str] = []
    values: list[Sequence[Any]] = []
    last, seen, defaults = 0.0, set(), 0
    for each in finalists:
        _, place, implementation, config, ms, _, guess_ms, default, *_ = each
        predicted_ms = _number(guess_ms)
        slowness = _number(ms) or predicted_ms or math.inf
        defaults += default
        if (
            place != len(texts)
            or (place > 1 and slowness < last)
            or (default and ms != ours)
            or default not in (0, 1)
            or not _candidate(implementation, config)
        ):
            return None
        last = slowness
        seen.add((implementation, config))
        values.append(each[2:])
        texts.append(_finalist([*each[2:7], bool(default), *each[8:]]))
    first_ms = finalists[0][4] if finalists else None
    environment = _environment(versions)
    if (
        not 1 <= len(texts) == len(seen) <= MOST_FINALISTS
        or defaults > 1
        or op != kernel_op
        or trusted not in (0, 1)
        or not _names(op, kernel, mode, origin)
        or not (first_ms and ours and interval != NONE if measured else first_ms is ours is None and interval == NONE)
        or sum(map(len, texts)) > checks.MAX_JSON - len(texts) - 2
        or environment.text != versions
        or not (_sources(sources) and _notes(notes))
    ):
        return None
    created_at = time_text(at) if isinstance(at, datetime) else at
    checks.parse_time(created_at, "created_at")
    told = Columns(
        op, checks.problem(problem), _device(name, arch, sm_count), environment, kernel, status, mode, ours, interval,
        sources, origin, bool(trusted), created_at, notes,
    )  # fmt: skip
    return Written.of(told, values, text_of(told, texts))


def _finalist(values: Sequence[Any]) -> str:
    return (_remembered if len(values[-2]) + len(values[-1]) < _BRIEF else _looked_at)(*values)


def _looked_at(*values: Any) -> str:
    _, _, _, code, _, _, value, low, high, samples_ms, again = values
    if code != "":
        checks.digest(code, "code")
    if samples_ms != "[]" and not _samples(samples_ms):
        raise ValueError("not samples")
    if again != "null" and _again(again) != again:
        raise ValueError("not a second contest")
    _three(value, low, high)
    return finalist_text(values)


# Files and registries that are merged have much in common: what ships, above all.
_remembered = lru_cache(4 * _SHARED, typed=True)(_looked_at)


def _notes(text: str) -> bool:
    return (_brief_notes if len(text) < _BRIEF else are_notes)(text)


_brief_notes = lru_cache(_SHARED)(are_notes)


def _number(value: Any) -> float | None:
    if value is None or (type(value) is float and 0.0 < value < math.inf):
        return value
    raise ValueError("not a time")


def _three(value: Any, low: Any, high: Any) -> Three:
    if value is low is high is None:
        return NONE
    if type(value) is type(low) is type(high) is float and 0.0 < value < math.inf and 0.0 < low <= high < math.inf:
        return value, low, high
    raise ValueError("not a speed-up")


# Fifteen digits or fewer, neither large nor small, without a zero to spare: such a number is written in no other way,
# which is known without reading it. All times are such that are rounded to a nanosecond.
_SHORT = r"(?:0\.0{0,3}[1-9](?:\d{0,13}[1-9])?|[1-9]\d{0,6}\.(?:0|\d{0,7}[1-9]))"
_SHORTS = rf"\[{_SHORT}(?:,{_SHORT})*+\]"
_short_samples = re.compile(_SHORTS, re.ASCII).fullmatch
_short_again = re.compile(
    rf'\{{"default_samples_ms":({_SHORTS}),"samples_ms":({_SHORTS}),"speedup":\[{_SHORT},({_SHORT}),({_SHORT})\]\}}',
    re.ASCII,
).fullmatch


def _samples(text: str) -> bool:
    if _short_samples(text):
        return text.count(",") < checks.MAX_SAMPLES
    values = json.loads(text)
    whole = type(values) is list and len(values) <= checks.MAX_SAMPLES and set(map(type, values)) == {float}
    return whole and min(values) > 0.0 and math.isfinite(sum(values)) and numbers(values) == text


def _again(text: str) -> str:
    if found := _short_again(text):
        samples, others, low, high = found.groups()
        if max(samples.count(","), others.count(",")) < checks.MAX_SAMPLES and float(low) <= float(high):
            return text
    second = Again.of(json.loads(text))
    return "null" if second is None else canonical(second.content())


@lru_cache(_SHARED)
def _measured(status: str) -> bool:
    return VerdictStatus(status) is not VerdictStatus.PREDICTED


@lru_cache(_SHARED)
def _names(op: str, kernel: str, mode: str, origin: str) -> bool:
    checks.digest(kernel, "kernel")
    return bool(checks.name(op, "op") and checks.name(origin, "origin")) and mode in MODES


@lru_cache(_SHARED, typed=True)
def _device(name: str, arch: str, sm_count: int) -> Device:
    return Device(name, arch, sm_count)


@lru_cache(_SHARED)
def _environment(text: str) -> Environment:
    return Environment(json.loads(text))


@lru_cache(_SHARED)
def _sources(text: str) -> bool:
    return canonical(checks.sources(json.loads(text))) == text


@lru_cache(4 * _SHARED)
def _candidate(implementation: str, config: str) -> bool:
    return bool(checks.name(implementation, "implementation")) and checks.config_of(config).text == config
