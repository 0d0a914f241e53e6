"""A verdict as the texts that it is stored, signed and exported as, every part of it written once.

`Written.portable` is what `canonical(verdict.portable())` would give, and the digests are of such texts; put together
from its parts it takes a tenth of the time, since most of a verdict is samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from tilebook.registry import codec
from tilebook.registry.checks import canonical, parse_time, time_text
from tilebook.registry.records import Device, Environment, Revocation, Trial
from tilebook.registry.verdict import Finalist, Speedup, Verdict, VerdictStatus

Three = tuple[float | None, float | None, float | None]
NONE: Three = (None, None, None)


class Columns(NamedTuple):
    """What the tables hold of a verdict, all but its finalists and digests; sources and notes are JSON."""

    op: str
    problem: str
    device: Device
    environment: Environment
    kernel: str
    status: str
    mode: str
    default_time_ms: float | None
    interval: Three
    sources: str
    origin: str
    trusted: bool
    created_at: str
    notes: str


FINALIST = (
    "implementation",
    "config",
    "time_ms",
    "code",
    "predicted_ms",
    "is_default",
    "speedup",
    "speedup_low",
    "speedup_high",
    "samples_ms",
    "again",
)
"""The columns of a finalist's row, all but the verdict's id and the place; config, samples and second contest are
JSON."""


class Text(NamedTuple):
    """All that a verdict says, in three pieces: before its problem, the problem, after it."""

    head: str
    problem: str
    tail: str

    @property
    def portable(self) -> str:
        """Canonical JSON of `Verdict.portable`."""
        return f"{self.head}{self.problem}{self.tail}}}"

    def sha256(self, origin: str, trusted: bool) -> str:
        """`Verdict.sha256`."""
        flag = "true" if trusted else "false"
        text = f'{self.head}"origin":"{origin}",{self.problem}{self.tail},"trusted":{flag}}}'
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def line(self) -> str:
        """The verdict's line in the exchange format, with the end of the line."""
        sha256 = hashlib.sha256(self.portable.encode()).hexdigest()
        return f'{self.head}{self.problem}"sha256":"{sha256}",{self.tail},"type":"verdict"}}\n'


def text_of(told: Columns, finalists: Iterable[str]) -> Text:
    """finalists: their JSON."""
    return Text(
        f'{{"created_at":"{told.created_at}","default_time_ms":{number(told.default_time_ms)},'
        f'"device":{told.device.text},"environment":{told.environment.text},"finalists":[{",".join(finalists)}],'
        f'"interval":{three(told.interval)},"kernel":"{told.kernel}","mode":"{told.mode}","notes":{told.notes},'
        f'"op":"{told.op}",',
        f'"problem":{_string(told.problem)},',
        f'"sources":{told.sources},"status":"{told.status}"',
    )


def finalist_text(values: Sequence[Any]) -> str:
    """The JSON of a finalist, of the values of FINALIST."""
    implementation, config, time_ms, code, predicted_ms, default, value, low, high, samples_ms, again = values
    speedup = "null" if value is None else f"[{value!r},{low!r},{high!r}]"
    return (
        f'{{"again":{again},"code":"{code}","config":{config},"default":{"true" if default else "false"},'
        f'"implementation":"{implementation}","predicted_ms":{"null" if predicted_ms is None else repr(predicted_ms)},'
        f'"samples_ms":{samples_ms},"speedup":{speedup},"time_ms":{"null" if time_ms is None else repr(time_ms)}}}'
    )


def served_of(told: Columns, finalists: Iterable[Sequence[Any]]) -> str:
    """`served.digest`. finalists: the values of FINALIST."""
    value, low, high = map(number, told.interval)
    device = told.device
    ranked = [
        f'["{each[0]}",{_string(each[1])},{"null" if each[2] is None else repr(each[2])},"{each[3]}"]'
        for each in finalists
    ]
    text = (
        f'[["{told.op}",{_string(told.problem)},{_string(device.name)},"{device.arch}",{device.sm_count}],'
        f'[{_string(told.environment.text)},"{told.kernel}","{told.status}","{told.mode}",{value},{low},{high},'
        f'{_string(told.sources)},"{told.origin}",{int(told.trusted)}],[{",".join(ranked)}]]'
    )
    return hashlib.sha256(text.encode()).hexdigest()


def number(value: float | None) -> str:
    return "null" if value is None else f"{value!r}"


def numbers(values: Sequence[float]) -> str:
    return _COMPACT(values) if values else "[]"


def three(values: Three) -> str:
    first, second, third = values
    return "null" if values == NONE else f"[{first!r},{second!r},{third!r}]"


class Written:
    """A verdict as texts, and what is asked of it without its finalists being made: `told`, and the values of FINALIST.

    A verdict that was never made, since its columns say all that is wanted, is made where it is asked for.
    """

    __slots__ = ("__weakref__", "_digests", "_text", "_verdict", "finalists", "told")

    def __init__(self, verdict: Verdict) -> None:
        self._verdict: Verdict | None = verdict
        self.told = _told(verdict)
        self.finalists: Sequence[Sequence[Any]] = [_finalist(each) for each in verdict.finalists]
        self._text: Text | None = text_of(self.told, map(finalist_text, self.finalists))
        self._digests: tuple[str, str] | None = None

    @classmethod
    def of(
        cls,
        told: Columns,
        finalists: Sequence[Sequence[Any]],
        text: Text | None = None,
        digests: tuple[str, str] | None = None,
    ) -> Written:
        """Of columns that have been looked at as a verdict would look at them, see `quick.whole`.

        text, digests (`sha256` and `served`): where they are known already.
        """
        self = cls.__new__(cls)
        self._verdict, self.told, self.finalists, self._text, self._digests = None, told, finalists, text, digests
        return self

    @property
    def text(self) -> Text:
        """All that it says."""
        if self._text is None:
            self._text = text_of(self.told, map(finalist_text, self.finalists))
        return self._text

    @property
    def verdict(self) -> Verdict:
        if self._verdict is None:
            told = self.told
            self._verdict = codec.verdict_like(json.loads(self.portable), origin=told.origin, trusted=told.trusted)
        return self._verdict

    @property
    def measured(self) -> bool:
        """`Verdict.measured`."""
        return self.told.status != VerdictStatus.PREDICTED.value

    @property
    def portable(self) -> str:
        """Canonical JSON of `Verdict.portable`."""
        return self.text.portable

    @property
    def sha256(self) -> str:
        """`Verdict.sha256`."""
        return self._digests[0] if self._digests else self.text.sha256(self.told.origin, self.told.trusted)

    @property
    def line(self) -> str:
        """Its line in the exchange format, with the end of the line."""
        return self.text.line

    @property
    def served(self) -> str:
        """See `served.digest`."""
        return self._digests[1] if self._digests else served_of(self.told, self.finalists)


Record = Trial | Written | Revocation
"""What a registry takes and gives."""

_COMPACT = json.JSONEncoder(separators=(",", ":")).encode
_string = lru_cache(8_192)(json.JSONEncoder().encode)  # configs, problems and sources, which many verdicts repeat


def _told(verdict: Verdict) -> Columns:
    return Columns(
        verdict.op,
        verdict.problem,
        verdict.device,
        verdict.environment,
        verdict.kernel,
        verdict.status.value,
        verdict.mode,
        verdict.default_time_ms,
        _three(verdict.interval),
        canonical(verdict.sources),
        verdict.origin,
        verdict.trusted,
        time_text(verdict.created_at),
        canonical(verdict.notes),
    )


def _finalist(each: Finalist) -> Sequence[Any]:
    """The values of FINALIST."""
    again = "null"
    if each.again is not None:
        second = each.again
        again = (
            f'{{"default_samples_ms":{numbers(second.default_samples_ms)},'
            f'"samples_ms":{numbers(second.samples_ms)},"speedup":{three(_three(second.speedup))}}}'
        )
    return (
        each.implementation,
        each.config_text,
        each.time_ms,
        each.code,
        each.predicted_ms,
        each.default,
        *_three(each.speedup),
        numbers(each.samples_ms),
        again,
    )


def _three(speedup: Speedup | None) -> Three:
    return NONE if speedup is None else (speedup.value, speedup.low, speedup.high)


VERDICT = (
    "sha256",
    "served",
    "status",
    "mode",
    "default_time_ms",
    "speedup",
    "speedup_low",
    "speedup_high",
    "sources",
    "origin",
    "trusted",
    "notes",
    "created_at",
)
"""The columns of a verdict's row, all but the ids."""


def values(written: Written) -> tuple[Any, ...]:
    """The values of VERDICT; the time as a text."""
    told = written.told
    return (
        written.sha256,
        written.served,
        told.status,
        told.mode,
        told.default_time_ms,
        *told.interval,
        told.sources,
        told.origin,
        told.trusted,
        told.notes,
        told.created_at,
    )


def columns(written: Written) -> Mapping[str, Any]:
    """A verdict's row, all but the ids."""
    found = dict(zip(VERDICT, values(written), strict=True))
    return {**found, "created_at": parse_time(found["created_at"], "created_at")}


def finalist_columns(values: Sequence[Any], place: int) -> Mapping[str, Any]:
    """A finalist's row, all but the verdict's id."""
    return {"place": place, **dict(zip(FINALIST, values, strict=True))}
