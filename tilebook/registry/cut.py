"""A verdict's columns cut out of its line of the exchange format, so that no JSON is parsed that many lines repeat.

Where a line is cut is a guess. `quick` looks at the columns as at those of a row, and writes the line of them: where
that is the very line that was read, and only there, it is known what the line says.
"""

from __future__ import annotations

import re
from functools import lru_cache
from json import loads
from typing import Any

from tilebook.registry.checks import DAMAGE, fields
from tilebook.registry.quick import whole
from tilebook.registry.records import Device
from tilebook.registry.texts import Written

_VALUE = r'([^,"\[\]{}]*+)'
_FLAT = r"(\{[^{}]*+\})"
_LIST = r"\[[^\[\]]*+\]"
_TEXT = r'"([^"\\]*+)"'
_OP = ',"op":'
_HEAD = re.compile(
    rf'\{{"created_at":{_TEXT},"default_time_ms":{_VALUE},"device":{_FLAT},"environment":{_FLAT},"finalists":\['
).match
_AGAIN = rf'(null|\{{"default_samples_ms":{_LIST},"samples_ms":{_LIST},"speedup":{_LIST}\}})'
_FINALIST = re.compile(
    rf'\{{"again":{_AGAIN},"code":{_TEXT},"config":{_FLAT},"default":(true|false),"implementation":{_TEXT},'
    rf'"predicted_ms":{_VALUE},"samples_ms":({_LIST}),"speedup":(null|{_LIST}),"time_ms":{_VALUE}\}}([,\]])'
).match
_MIDDLE = re.compile(rf',"interval":(null|{_LIST}),"kernel":{_TEXT},"mode":{_TEXT},"notes":').match
_END = re.compile(
    rf'{_OP}{_TEXT},"problem":("[^"\\]*+(?:\\.[^"\\]*+)*+"),"sha256":{_TEXT},"sources":{_FLAT},"status":{_TEXT},'
).match


def cut(line: str, origin: str, trusted: bool) -> Written | None:
    """The verdict whose line this is, to the character; None for all else, right or wrong."""
    try:
        found = _cut(line, origin, trusted)
    except DAMAGE:
        return None
    return found if found is not None and found.line == line else None


def _cut(line: str, origin: str, trusted: bool) -> Written | None:
    if (head := _HEAD(line)) is None:
        return None
    created_at, default_time_ms, device, environment = head.groups()
    finalists: list[tuple[Any, ...]] = []
    place, more = head.end(), ","
    while more == ",":
        if (found := _FINALIST(line, place)) is None:
            return None
        again, code, config, default, implementation, predicted_ms, samples_ms, speedup, time_ms, more = found.groups()
        finalists.append(
            (
                0, len(finalists), implementation, config, _number(time_ms), code, _number(predicted_ms),
                default == "true", *_three(speedup), samples_ms, again,
            )
        )  # fmt: skip
        place = found.end()
    if (middle := _MIDDLE(line, place)) is None:
        return None
    interval, kernel, mode = middle.groups()
    after = line.rfind(_OP)
    if (end := _END(line, after)) is None:
        return None
    op, problem, _, sources, status = end.groups()
    row = (
        0, "", "", op, _text(problem), *_device(device), environment, op, kernel, status, mode,
        _number(default_time_ms), *_three(interval), sources, origin, trusted, created_at,
        line[middle.end() : after],
    )  # fmt: skip
    return whole(row, finalists)


def _number(text: str) -> float | None:
    return None if text == "null" else float(text)


def _three(text: str) -> tuple[float | None, ...]:
    return (None, None, None) if text == "null" else tuple(map(float, text[1:-1].split(",")))


@lru_cache(1_024)  # one problem has verdicts on many GPUs
def _text(text: str) -> Any:
    return loads(text)


@lru_cache(1_024)
def _device(text: str) -> tuple[Any, ...]:
    told = fields(loads(text), "device", tuple(Device.__dataclass_fields__))
    return told["name"], told["arch"], told["sm_count"]
