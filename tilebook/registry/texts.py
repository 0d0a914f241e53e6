"""A verdict as the texts that it is stored, signed and exported as, every part of it written once.

`Written.portable` is what `canonical(verdict.portable())` would give, and the digests are of such texts; put together
from its parts it takes a tenth of the time, since most of a verdict is samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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


class Written:
    """The texts of a verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.sources, self.notes = canonical(verdict.sources), canonical(verdict.notes)
        self.finalists = [_finalist(each) for each in verdict.finalists]
        self.created_at = time_text(verdict.created_at)
        self._head = (
            f'{{"created_at":"{self.created_at}","default_time_ms":{_number(verdict.default_time_ms)},'
            f'"device":{verdict.device.text},"environment":{verdict.environment.text},'
            f'"finalists":[{",".join([each.whole for each in self.finalists])}],'
            f'"interval":{_speedup(verdict.interval)},"kernel":"{verdict.kernel}","mode":"{verdict.mode}",'
            f'"notes":{self.notes},"op":"{verdict.op}",'
        )
        self._problem = f'"problem":{json.dumps(verdict.problem)},'
        self._tail = f'"sources":{self.sources},"status":"{verdict.status.value}"'

    @property
    def portable(self) -> str:
        """Canonical JSON of `Verdict.portable`."""
        return f"{self._head}{self._problem}{self._tail}}}"

    @property
    def sha256(self) -> str:
        """`Verdict.sha256`."""
        verdict = self.verdict
        trusted = "true" if verdict.trusted else "false"
        text = f'{self._head}"origin":"{verdict.origin}",{self._problem}{self._tail},"trusted":{trusted}}}'
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def line(self) -> str:
        """Its line in the exchange format, with the end of the line."""
        sha256 = hashlib.sha256(self.portable.encode()).hexdigest()
        return f'{self._head}{self._problem}"sha256":"{sha256}",{self._tail},"type":"verdict"}}\n'

    @property
    def served(self) -> str:
        """See `served.digest`."""
        verdict, interval = self.verdict, self.verdict.interval
        value, low, high = (None,) * 3 if interval is None else (interval.value, interval.low, interval.high)
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

_COMPACT = json.JSONEncoder(separators=(",", ":")).encode


def _finalist(each: Finalist) -> FinalistTexts:
    config, samples = each.config_text, _numbers(each.samples_ms)
    again = "null"
    if each.again is not None:
        second = each.again
        again = (
            f'{{"default_samples_ms":{_numbers(second.default_samples_ms)},'
            f'"samples_ms":{_numbers(second.samples_ms)},"speedup":{_speedup(second.speedup)}}}'
        )
    whole = (
        f'{{"again":{again},"code":"{each.code}","config":{config},"default":{"true" if each.default else "false"},'
        f'"implementation":"{each.implementation}","predicted_ms":{_number(each.predicted_ms)},'
        f'"samples_ms":{samples},"speedup":{_speedup(each.speedup)},"time_ms":{_number(each.time_ms)}}}'
    )
    return FinalistTexts(config, samples, again, whole)


def _number(value: float | None) -> str:
    return "null" if value is None else float.__repr__(value)


def _numbers(values: tuple[float, ...]) -> str:
    return f"[{','.join(map(float.__repr__, values))}]"


def _speedup(speedup: Speedup | None) -> str:
    return "null" if speedup is None else _numbers((speedup.value, speedup.low, speedup.high))


def columns(written: Written) -> Mapping[str, Any]:
    """The columns of a verdict's row, all but the ids of the rows that it shares."""
    verdict = written.verdict
    return {
        "sha256": written.sha256,
        "served": written.served,
        "status": verdict.status.value,
        "mode": verdict.mode,
        "default_time_ms": verdict.default_time_ms,
        **_speedup_columns(verdict.interval),
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
    speedup = finalist.speedup
    return (
        finalist.implementation,
        texts.config,
        finalist.time_ms,
        finalist.code,
        finalist.predicted_ms,
        finalist.default,
        *((None, None, None) if speedup is None else (speedup.value, speedup.low, speedup.high)),
        texts.samples_ms,
        texts.again,
    )


def finalist_columns(finalist: Finalist, texts: FinalistTexts, place: int) -> Mapping[str, Any]:
    """A finalist's row, all but the verdict's id."""
    return {"place": place, **dict(zip(FINALIST, finalist_values(finalist, texts), strict=True))}


def _speedup_columns(speedup: Speedup | None) -> dict[str, float | None]:
    if speedup is None:
        return {"speedup": None, "speedup_low": None, "speedup_high": None}
    return {"speedup": speedup.value, "speedup_low": speedup.low, "speedup_high": speedup.high}
