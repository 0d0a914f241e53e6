"""What a record's fields may hold: one set of limits for records made here and for records read from a stranger's file.

Every function returns the value in its normal form or raises ValueError; messages quote at most 60 characters, escaped.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TypeAlias, TypeGuard

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"
ConfigValue: TypeAlias = int | str | bool

MAX_TEXT = 4_000  # characters of a reason, or of any string inside facts and evidence
MAX_PROBLEM = 2_000  # characters; the key is indexed, and a PostgreSQL index entry ends at 2,700 bytes
MAX_JSON = 512 * 1024  # characters of one record's facts or evidence
MAX_DEPTH = 12
MAX_SAMPLES = 10_000
MAX_CONFIG = 64

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+-]{0,63}\Z")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
_CHOICE = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_DIGEST = re.compile(r"[0-9a-f]{8,64}\Z")
# Digits are those of ASCII: `int` reads all others too, so that one version would be written in many ways.
_BOUND = re.compile(r"(>=|<=|==|>|<)(\d{1,9}(?:\.\d{1,9}){0,5})\Z", re.ASCII)
_RELEASE = re.compile(r"\d{1,9}(?:\.\d{1,9})*", re.ASCII)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00\Z", re.ASCII)
# C0 and C1 controls, line separators, bidirectional overrides (they reorder what a terminal shows) and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LINE_BREAK = re.compile(r"[\n\t]")

# Triton reads this one as a path to replacement code, so no record may carry it, whatever an allow-list says.
_FORBIDDEN_KEYS = frozenset({"ir_override"})


# What bad values make of decoding: wrong types and texts, JSON that nests without end, a row whose partner is gone.
DAMAGE = (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)


def canonical(value: Json) -> str:
    """The one text of a JSON value: sorted keys, no spaces, ASCII, no NaN or infinity (ValueError)."""
    return _CANONICAL(value)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def quoted(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def name(value: object, what: str) -> str:
    if type(value) is not str or not _is_name(value):
        raise ValueError(f"{what} is not a plain name: {quoted(value)}")
    return value


@lru_cache(1_024)  # every record has many, and all have the same
def _is_name(value: str) -> bool:
    return _NAME.match(value) is not None


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """`isinstance`, which is slow for what is nearly always a plain dictionary."""
    return type(value) is dict or isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Is it a sequence of values, and no text? As `is_mapping`."""
    return type(value) in (list, tuple) or (isinstance(value, Sequence) and not isinstance(value, str))


def digest(value: object, what: str) -> str:
    if type(value) is not str or not _DIGEST.match(value):
        raise ValueError(f"{what} is not a hex digest: {quoted(value)}")
    return value


def label(value: object, what: str) -> str:
    """One printable line of 1 to 128 characters: a GPU's name, a version."""
    if type(value) is not str or not 1 <= len(value) <= 128 or _UNPRINTABLE.search(value) or _LINE_BREAK.search(value):
        raise ValueError(f"{what} is not one short printable line: {quoted(value)}")
    return value


def words(name: str) -> list[str]:
    """The words of a GPU's name, in small letters."""
    return re.findall(r"[a-z0-9]+", name.lower())


@lru_cache(1_024)
def called(gpu: str, name: str) -> bool:
    """Are all words of `gpu` words of a GPU's name? "a100" is of "NVIDIA A100-SXM4-80GB"; "H20" is no H200."""
    wanted = set(words(gpu))
    return bool(wanted) and wanted <= set(words(name))


def text(value: object, what: str) -> str:
    """Free text, made printable and cut in the middle: a compiler's first and last words both matter."""
    if type(value) is not str:
        raise ValueError(f"{what} is not a string: {quoted(value)}")
    value = _UNPRINTABLE.sub("\ufffd", value)
    if len(value) <= MAX_TEXT:
        return value
    half = MAX_TEXT // 2 - 5
    return f"{value[:half]} [...] {value[-half:]}"


def integer(value: object, what: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is not an integer from {low} to {high}: {quoted(value)}")
    return value


def number(value: object, what: str) -> float:
    """A finite float, zero or more. SQLite has no negative zero, so neither have records."""
    if type(value) is float and 0.0 < value < math.inf:
        return value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{what} is not a number: {quoted(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or result < 0:
        raise ValueError(f"{what} is not finite, or below zero: {quoted(value)}")
    return result + 0.0


def optional_number(value: object, what: str) -> float | None:
    return None if value is None else number(value, what)


class Config(dict[str, ConfigValue]):
    """A config that has been checked, and its canonical JSON. Records that have the same one share it."""

    __slots__ = ("text",)

    def __init__(self, value: Mapping[str, ConfigValue]) -> None:
        super().__init__(value)
        self.text = canonical(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)


@lru_cache(4_096)  # the finalists of thousands of verdicts are of a few hundred configs
def config_of(text: str) -> Config:
    """The config of a JSON text. Raises ValueError."""
    return Config(config(json.loads(text)))


def config(value: object) -> dict[str, ConfigValue]:
    if type(value) is Config:
        return value
    if not is_mapping(value) or len(value) > MAX_CONFIG:
        raise ValueError(f"config is not a mapping of at most {MAX_CONFIG} keys")
    for key, item in value.items():
        if type(key) is not str or not _is_config_key(key):
            raise ValueError(f"config key is not allowed: {quoted(key)}")
        if type(item) is bool:
            continue
        if type(item) is int:
            integer(item, f"config {key}", -(2**31), 2**31)
        elif type(item) is not str or not _CHOICE.match(item):
            raise ValueError(f"config {key} is not an integer, a flag or a short plain string: {quoted(item)}")
    return dict(value)


@lru_cache(1_024)
def _is_config_key(key: str) -> bool:
    return _KEY.match(key) is not None and key not in _FORBIDDEN_KEYS


def versions(value: object) -> dict[str, str]:
    if not is_mapping(value) or len(value) > MAX_CONFIG:
        raise ValueError(f"environment is not a mapping of at most {MAX_CONFIG} versions")
    return {name(key, "environment key"): label(item, f"version of {key}") for key, item in value.items()}


def version_range(value: object, what: str) -> str:
    """Bounds such as `<3.7,>=3.6`, all of which a release must keep, sorted and without spaces.

    PEP 440's comparisons of release numbers; a range that no release is in is refused as well.
    """
    parts = value.split(",") if type(value) is str else []
    bounds = sorted({"".join(part.split()) for part in parts})
    if not bounds or len(",".join(bounds)) > 200 or not all(map(_BOUND.match, bounds)):
        raise ValueError(f"{what} is not a range of versions such as '>=3.6,<3.7': {quoted(value)}")
    releases = [_release(bound.lstrip("<=>")) for bound in bounds]
    just_above = [(*release, *(0,) * 6, 1) for release in releases]
    if not any(_keeps(release, bounds) for release in [(), *releases, *just_above]):
        raise ValueError(f"{what} is a range that no version is in: {quoted(value)}")
    return ",".join(bounds)


def in_range(version: str, bounds: str) -> bool:
    """Whether a version is in a `version_range`; its release number alone counts, and one that has none always is."""
    return not _RELEASE.match(version) or _keeps(_release(version), bounds.split(","))


def _release(version: str) -> tuple[int, ...]:
    """(3, 6) of "3.6.0", "3.6rc1" and "3.6.0+git1a2b"."""
    found = _RELEASE.match(version)
    numbers = [int(number) for number in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _keeps(release: tuple[int, ...], bounds: Sequence[str]) -> bool:
    kept = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}
    return all(kept[bound.rstrip("0123456789.")](release, _release(bound.lstrip("<=>"))) for bound in bounds)


def json_object(value: object, what: str) -> dict[str, Json]:
    """A copy with plain dicts and lists, so that what was recorded equals what is read back."""
    result = plain_object(value, what)
    if len(canonical(result)) > MAX_JSON:
        raise ValueError(f"{what} is longer than {MAX_JSON} characters")
    return result


def plain_object(value: object, what: str) -> dict[str, Json]:
    """`json_object` of any length."""
    if not is_mapping(value):
        raise ValueError(f"{what} is not a mapping: {quoted(value)}")
    return {_json_key(key, what): _json(item, what, 1) for key, item in value.items()}


def fields(value: object, what: str, wanted: Sequence[str]) -> dict[str, Any]:
    """A copy of an object that has these fields and no others."""
    if not is_mapping(value):
        raise ValueError(f"the {what} is not an object: {quoted(value)}")
    if set(wanted) != value.keys():
        missing, unknown = sorted(set(wanted) - value.keys()), sorted(map(str, value.keys() - set(wanted)))
        raise ValueError(f"the {what}'s fields are wrong: missing {quoted(missing)}, unknown {quoted(unknown)}")
    return dict(value)


def sources(value: object) -> dict[str, str]:
    """Implementation → the digest of its source, or its package and version."""
    if not is_mapping(value) or len(value) > MAX_CONFIG:
        raise ValueError(f"sources are not a mapping of at most {MAX_CONFIG} implementations")
    return {name(key, "implementation"): label(item, f"source of {key}") for key, item in value.items()}


@lru_cache(1_024)  # notes have the same ones
def _json_key(value: object, what: str) -> str:
    return label(value, f"a key of {what}")


def _json(value: object, what: str, depth: int) -> Json:
    if depth > MAX_DEPTH:
        raise ValueError(f"{what} nests deeper than {MAX_DEPTH}")
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str):
        return text(str(value), what)
    if type(value) is int:
        return integer(value, what, -(2**63), 2**63 - 1)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{what} holds a number that is not finite")
        return float(value)
    if is_mapping(value):
        if depth < MAX_DEPTH and _are_plain(value.values()):
            return {_json_key(key, what): item for key, item in value.items()}
        return {_json_key(key, what): _json(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if depth < MAX_DEPTH and _are_plain(value):
            return list(value)
        return [_json(item, what, depth + 1) for item in value]
    raise ValueError(f"{what} holds a {type(value).__name__}, which JSON has not")


def _are_plain(values: Collection[Any]) -> bool:
    """Are they whole numbers and flags, or floats, all of which are as looking at each would leave them?"""
    kinds = set(map(type, values))
    if kinds <= {int, bool}:
        return not kinds or (min(values) >= -(2**63) and max(values) < 2**63)
    return kinds == {float} and math.isfinite(sum(values))


def problem(value: object) -> str:
    """The canonical JSON text of a problem; compared byte by byte, so any other spelling is refused.

    What it says is shown to people, and so all its texts are lines that can be printed.
    """
    if type(value) is not str or len(value) > MAX_PROBLEM:
        raise ValueError(f"problem is not a text of at most {MAX_PROBLEM} characters: {quoted(value)}")
    return _problem(value)


@lru_cache(1_024)  # one problem has verdicts on many GPUs, and hundreds of trials
def _problem(value: str) -> str:
    try:
        parsed = json.loads(value)
        same = type(parsed) is dict and canonical(parsed) == value
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError(f"problem is not canonical JSON: {quoted(value)}")
    json_object(parsed, "problem")
    if not _are_lines(parsed):
        raise ValueError(f"problem holds a text that is no printable line: {quoted(value)}")
    return value


def _are_lines(value: object) -> bool:
    """Can all texts in a JSON value be printed, each on one line? Keys have been looked at."""
    if isinstance(value, str):
        return not (_UNPRINTABLE.search(value) or _LINE_BREAK.search(value))
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return all(map(_are_lines, inner))


def utc(value: object, what: str) -> datetime:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError(f"{what} is not a time with a time zone: {quoted(value)}")
    return value.astimezone(UTC)


def time_text(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="microseconds")


def parse_time(value: object, what: str) -> datetime:
    if type(value) is not str or not _TIME.match(value):
        raise ValueError(f"{what} is not written like 2026-01-31T12:00:00.000000+00:00: {quoted(value)}")
    return datetime.fromisoformat(value)
