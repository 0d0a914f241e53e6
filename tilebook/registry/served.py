"""A verdict as dispatch reads it: without the samples and the notes behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tilebook.registry import checks
from tilebook.registry.checks import ConfigValue, canonical
from tilebook.registry.records import Device
from tilebook.registry.verdict import MODES, Speedup, Verdict, VerdictStatus


@dataclass(frozen=True, slots=True)
class Finalist:
    """A candidate that a verdict found right. `time_ms` is of one call, None where nothing was measured.

    code: the digest of its machine code; "" where it is not ours, or not known.
    """

    implementation: str
    config: Mapping[str, ConfigValue]
    time_ms: float | None
    code: str


@dataclass(frozen=True, slots=True)
class Served:
    """What dispatch needs of a verdict.

    problem:     canonical JSON. kernel: the digest of the op's own kernel when this was measured.
    sources:     the digest that each implementation of ours had then, or the package and version of others'.
    status:      "measured" (a candidate beat the default), "default" (the default won) or "predicted" (never run).
    mode:        how calls were timed: "graph" or "eager".
    trusted:     whether it may be served: whoever serves has to ask.
    layer:       where it was found. origin: who put it there.
    environment: versions of what it was measured with: torch, triton, cudnn …
    speedup:     default's time over winner's, with its 95 % interval; None where nothing was measured.
    finalists:   best first; the first is the winner.
    """

    op: str
    problem: str
    kernel: str
    sources: Mapping[str, str]
    status: str
    mode: str
    trusted: bool
    layer: str
    origin: str
    environment: Mapping[str, str]
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    finalists: tuple[Finalist, ...]

    @property
    def measured(self) -> bool:
        return self.status != "predicted"

    def source_of(self, implementation: str) -> str:
        """The digest of the source that this implementation had; the op's kernel where the verdict has no other."""
        return self.sources.get(implementation, self.kernel)


def of(verdict: Verdict, layer: str) -> Served:
    """What dispatch needs of a verdict that was read whole."""
    return Served(
        op=verdict.op,
        problem=verdict.problem,
        kernel=verdict.kernel,
        sources=verdict.sources,
        status=verdict.status.value,
        mode=verdict.mode,
        trusted=verdict.trusted,
        layer=layer,
        origin=verdict.origin,
        environment=verdict.environment.versions,
        speedup=verdict.speedup,
        speedup_low=verdict.speedup_low,
        speedup_high=verdict.speedup_high,
        finalists=tuple(
            Finalist(each.implementation, each.config, each.time_ms, each.code) for each in verdict.finalists
        ),
    )


def digest(verdict: Verdict) -> str:
    """SHA-256 in hex of what is served of a verdict. Its row keeps it, so that nothing else is read to check it."""
    return digest_of(
        verdict.op,
        verdict.problem,
        verdict.device,
        [
            canonical(verdict.environment.versions),
            verdict.kernel,
            verdict.status.value,
            verdict.mode,
            verdict.speedup,
            verdict.speedup_low,
            verdict.speedup_high,
            canonical(verdict.sources),
            verdict.origin,
            int(verdict.trusted),
        ],
        ([each.implementation, canonical(each.config), each.time_ms, each.code] for each in verdict.finalists),
    )


def digest_of(op: str, problem: str, device: Device, columns: Sequence[Any], finalists: Iterable[Sequence[Any]]) -> str:
    key = [op, problem, device.name, device.arch, device.sm_count]
    return hashlib.sha256(_COMPACT([key, list(columns), [list(each) for each in finalists]]).encode()).hexdigest()


_COMPACT = json.JSONEncoder(separators=(",", ":")).encode


COLUMNS = (
    "e.versions, k.digest, v.status, v.mode, v.speedup, v.speedup_low, v.speedup_high, v.sources, v.origin, v.trusted"
)
FINALIST_COLUMNS = "implementation, config, time_ms, code"


def from_columns(
    layer: str,
    op: str,
    problem: Any,
    device: Device,
    columns: Sequence[Any],
    finalists: Sequence[Sequence[Any]],
    sha256: str,
) -> Served | None:
    """A verdict of the values of COLUMNS and, best first, of FINALIST_COLUMNS; None where they are damaged.

    A digest says that nothing was lost, not who wrote it: the values are checked as those of any record.
    """
    try:
        if digest_of(op, problem, device, columns, finalists) != sha256:
            return None
        versions, kernel, status, mode, speedup, low, high, sources, origin, trusted = columns
        if mode not in MODES or trusted not in (0, 1) or not finalists:
            return None
        status, contest = VerdictStatus(status), (speedup, low, high)
        interval = None if contest == (None, None, None) else Speedup(speedup, low, high)
        ranked = tuple(_finalist(*each) for each in finalists)
        if {status is VerdictStatus.PREDICTED} != {interval is None, ranked[0].time_ms is None}:
            return None
        return Served(
            op=op,
            problem=checks.problem(problem),
            kernel=checks.digest(kernel, "kernel"),
            sources=_sources(sources),
            status=status.value,
            mode=mode,
            trusted=bool(trusted),
            layer=layer,
            origin=checks.name(origin, "origin"),
            environment=_versions(versions),
            speedup=None if interval is None else interval.value,
            speedup_low=None if interval is None else interval.low,
            speedup_high=None if interval is None else interval.high,
            finalists=ranked,
        )
    except checks.DAMAGE:
        return None


def _finalist(implementation: Any, config: Any, time_ms: Any, code: Any) -> Finalist:
    if time_ms == 0:
        raise ValueError("a finalist took no time")
    return Finalist(
        checks.name(implementation, "implementation"),
        checks.config_of(config),
        checks.optional_number(time_ms, "time_ms"),
        checks.digest(code, "code") if code else "",
    )


@lru_cache(1_024)  # a few texts, which every verdict repeats
def _sources(text: str) -> Mapping[str, str]:
    return checks.sources(json.loads(text))


@lru_cache(1_024)
def _versions(text: str) -> Mapping[str, str]:
    return checks.versions(json.loads(text))
