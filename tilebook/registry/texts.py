"""A verdict as the texts that it is stored, signed and exported as, every part of it written once.

`Written.portable` is what `canonical(verdict.portable())` would give, and the digests are of such texts; put together
from its parts it takes a tenth of the time, since most of a verdict is samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tilebook.registry.checks import canonical, time_text
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.verdict import Finalist, Speedup, Verdict


class FinalistTexts(NamedTuple):
    """The JSON columns of a finalist, and all that it says."""

    config: str
    samples_ms: str
    again: str
    whole: str


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


Three = tuple[float | None, float | None, float | None]
NONE: Three = (None, None, None)


def text_of(
    created_at: str,
    default_time_ms: float | None,
    device: str,
    environment: str,
    finalists: Iterable[str],
    interval: Three,
    kernel: str,
    mode: str,
    notes: str,
    op: str,
    problem: str,
    sources: str,
    status: str,
) -> Text:
    """Of what the columns hold; device, environment, finalists, notes and sources are JSON."""
    return Text(
        f'{{"created_at":"{created_at}","default_time_ms":{number(default_time_ms)},'
        f'"device":{device},"environment":{environment},"finalists":[{",".join(finalists)}],'
        f'"interval":{three(interval)},"kernel":"{kernel}","mode":"{mode}","notes":{notes},"op":"{op}",',
        f'"problem":{_STRING(problem)},',
        f'"sources":{sources},"status":"{status}"',
    )


def finalist_text(
    implementation: str,
    config: str,
    time_ms: float | None,
    code: str,
    predicted_ms: float | None,
    default: bool,
    speedup: Three,
    samples_ms: str,
    again: str,
) -> str:
    """Likewise; config, samples and the second contest are JSON."""
    return (
        f'{{"again":{again},"code":"{code}","config":{config},"default":{"true" if default else "false"},'
        f'"implementation":"{implementation}","predicted_ms":{number(predicted_ms)},"samples_ms":{samples_ms},'
        f'"speedup":{three(speedup)},"time_ms":{number(time_ms)}}}'
    )


def number(value: float | None) -> str:
    return "null" if value is None else f"{value!r}"


def numbers(values: Iterable[float]) -> str:
    return f"[{','.join(map(float.__repr__, values))}]"


def three(values: Three) -> str:
    first, second, third = values
    return "null" if values == NONE else f"[{first!r},{second!r},{third!r}]"


class Written:
    """The texts of a verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.sources, self.notes = canonical(verdict.sources), canonical(verdict.notes)
        self.finalists = [_finalist(each) for each in verdict.finalists]
        self.text = text_of(
            time_text(verdict.created_at),
            verdict.default_time_ms,
            verdict.device.text,
            verdict.environment.text,
            [each.whole for each in self.finalists],
            _three(verdict.interval),
            verdict.kernel,
            verdict.mode,
            self.notes,
            verdict.op,
            verdict.problem,
            self.sources,
            verdict.status.value,
        )

    @property
    def portable(self) -> str:
        """Canonical JSON of `Verdict.portable`."""
        return self.text.portable

    @property
    def sha256(self) -> str:
        """`Verdict.sha256`."""
        return self.text.sha256(self.verdict.origin, self.verdict.trusted)

    @property
    def line(self) -> str:
        """Its line in the exchange format, with the end of the line."""
        return self.text.line

    @property
    def served(self) -> str:
        """See `served.digest`."""
        verdict, interval = self.verdict, self.verdict.interval
        value, low, high = _three(interval)
        device, environment = verdict.device, verdict.environment
        content = [
            [verdict.op, verdict.problem, device.name, device.arch, device.sm_count],
            [
                environment.text,
                verdict.kernel,
                verdict.status.value,
                verdict.mode,
                value,
                low,
                high,
                self.sources,
                verdict.origin,
                int(verdict.trusted),
            ],
            [
                [each.implementation, texts.config, each.time_ms, each.code]
                for each, texts in zip(verdict.finalists, self.finalists, strict=True)
            ],
        ]
        return hashlib.sha256(_COMPACT(content).encode()).hexdigest()


Record = Trial | Written | Revocation
"""What a registry takes and gives."""

_STRING = json.JSONEncoder().encode
_COMPACT = json.JSONEncoder(separators=(",", ":")).encode


def _finalist(each: Finalist) -> FinalistTexts:
    config, samples, again = each.config_text, numbers(each.samples_ms), "null"
    if each.again is not None:
        second = each.again
        again = (
            f'{{"default_samples_ms":{numbers(second.default_samples_ms)},'
            f'"samples_ms":{numbers(second.samples_ms)},"speedup":{three(_three(second.speedup))}}}'
        )
    speedup = _three(each.speedup)
    whole = finalist_text(
        each.implementation, config, each.time_ms, each.code, each.predicted_ms, each.default, speedup, samples, again
    )
    return FinalistTexts(config, samples, again, whole)


def _three(speedup: Speedup | None) -> Three:
    return NONE if speedup is None else (speedup.value, speedup.low, speedup.high)


def columns(written: Written) -> Mapping[str, Any]:
    """The columns of a verdict's row, all but the ids of the rows that it shares."""
    verdict = written.verdict
    return {
        "sha256": written.sha256,
        "served": written.served,
        "status": verdict.status.value,
        "mode": verdict.mode,
        "default_time_ms": verdict.default_time_ms,
        **dict(zip(("speedup", "speedup_low", "speedup_high"), _three(verdict.interval), strict=True)),
        "sources": written.sources,
        "origin": verdict.origin,
        "trusted": verdict.trusted,
        "created_at": verdict.created_at,
        "notes": written.notes,
    }


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
"""The columns of a finalist's row, all but the verdict's id and the place."""


def finalist_values(finalist: Finalist, texts: FinalistTexts) -> tuple[Any, ...]:
    """The values of FINALIST."""
    return (
        finalist.implementation,
        texts.config,
        finalist.time_ms,
        finalist.code,
        finalist.predicted_ms,
        finalist.default,
        *_three(finalist.speedup),
        texts.samples_ms,
        texts.again,
    )


def finalist_columns(finalist: Finalist, texts: FinalistTexts, place: int) -> Mapping[str, Any]:
    """A finalist's row, all but the verdict's id."""
    return {"place": place, **dict(zip(FINALIST, finalist_values(finalist, texts), strict=True))}
