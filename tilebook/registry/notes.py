"""A verdict's notes: plain JSON, in which what people are shown has the type that they are shown it by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tilebook.registry.checks import (
    MAX_DEPTH,
    MAX_JSON,
    Json,
    canonical,
    config,
    fields,
    integer,
    is_mapping,
    json_object,
    label,
    name,
    number,
    plain_object,
    quoted,
)

_HEX = re.compile(r"[0-9a-f]{0,4000}\Z")
_SHORT_TEXT = re.compile('"[^"]{1,128}"')
_LONG_NUMBER = re.compile(r"\d{19}")
_NO_BRACKET = re.compile(r"[^][{}]+")
_LEAF = re.compile(r"\[\]|\{\}")


def notes(value: object) -> dict[str, Json]:
    """A copy of a verdict's notes. Raises ValueError where it is none."""
    return _noted(json_object(value, "notes"))


def are_notes(text: str) -> bool:
    """Is that the canonical JSON of a verdict's notes? Raises ValueError where it is none of any."""
    if len(text) > MAX_JSON:
        raise ValueError(f"notes is longer than {MAX_JSON} characters")
    value = json.loads(text)
    if type(value) is not dict or not _is_plain(text):
        value = plain_object(value, "notes")
    return canonical(_noted(value)) == text


def _is_plain(text: str) -> bool:
    """Is a canonical JSON text of values that `plain_object` leaves as they are? Not every such text is known for one.

    Its texts have no escapes, so that all of them are printable, and 1 to 128 characters, its whole numbers 18 digits.
    """
    if "\\" in text:
        return False
    rest = _SHORT_TEXT.sub("", text)
    if '"' in rest or _LONG_NUMBER.search(rest):
        return False
    brackets = _NO_BRACKET.sub("", rest)
    for _ in range(MAX_DEPTH):
        brackets = _LEAF.sub("", brackets)
    return not brackets


def _noted(result: dict[str, Json]) -> dict[str, Json]:
    for key, check in _NOTES.items():
        if result.get(key) is not None:
            check(result[key], key)
    return result


def _count(value: object, what: str) -> None:
    integer(value, what, 0, 2**62)


def _counts(value: object, what: str) -> None:
    for item in _mapping(value, what).values():
        _count(item, what)


def _numbers(value: object, what: str) -> None:
    for item in _mapping(value, what).values():
        number(item, what)


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not is_mapping(value):
        raise ValueError(f"{what} is not a mapping: {quoted(value)}")
    return value


def _number(value: object, what: str) -> None:
    number(value, what)


def _spaces(value: object, what: str) -> None:
    for space in _mapping(value, what).values():
        _space(space, what)


def _space(value: object, what: str) -> None:
    """The axes of a space and, as hex digits in pieces, a bit for each of its points that was feasible."""
    space = _mapping(value, what)
    digits = space.get("feasible", [])
    pieces = digits if isinstance(digits, list) else [digits]
    if not all(type(each) is str and _HEX.match(each) for each in pieces):
        raise ValueError(f"the feasible points of {what} are not hex digits: {quoted(digits)}")
    for values in _mapping(space.get("axes", {}), what).values():
        if not isinstance(values, list):
            raise ValueError(f"an axis of {what} is not a list of values: {quoted(values)}")


def _searches(value: object, what: str) -> None:
    for search in _mapping(value, what).values():
        _count(_mapping(search, what).get("asked", 0), what)


def _candidates(value: object, what: str) -> None:
    for each in value if isinstance(value, list) else [value]:
        candidate = fields(each, what, ("implementation", "config"))
        name(candidate["implementation"], what)
        config(candidate["config"])


def made(value: object, what: str = "made") -> dict[str, str]:
    """Who made a record, on which machine, in which run: see `provenance`."""
    told = _mapping(value, what)
    if not told.keys() <= {"by", "machine", "run"}:
        raise ValueError(f"{what} names something else than by, machine and run: {quoted(dict(told))}")
    return {key: label(item, key) for key, item in told.items()}


_NOTES: Mapping[str, Callable[[object, str], object]] = {
    "tried": _count,
    "reused": _count,
    "infeasible": _count,
    "revoked": _count,
    "unconfirmed": _count,
    "searches": _searches,
    "rejected": _counts,
    "seconds": _numbers,
    "busy": _number,
    "predicted_default_ms": _number,
    "spaces": _spaces,
    "space": _space,
    "tied": _candidates,
    "made": made,
}
