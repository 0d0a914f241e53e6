"""A verdict: what dispatch serves for a problem on a device, and the evidence for it, field by field.

A verdict that exists has been checked whole: what reads one need not look again. A wrong value raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from tilebook.registry import checks
from tilebook.registry.checks import ConfigValue, Json, canonical
from tilebook.registry.notes import notes
from tilebook.registry.records import Device, Environment, check_key, digest_of, now

MODES = ("graph", "eager")
"""How calls were timed: as a CUDA graph, or from Python with what they cost the host."""

MOST_FINALISTS = 1_000


class VerdictStatus(StrEnum):
    """MEASURED: a candidate beat the default. DEFAULT: measured, and the default won. PREDICTED: never run."""

    MEASURED = "measured"
    PREDICTED = "predicted"
    DEFAULT = "default"


@dataclass(frozen=True)
class Speedup:
    """Time of the default over time of a candidate: the median of the rounds' ratios, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if type(self.value) is type(self.low) is type(self.high) is float and (
            0.0 < self.value < math.inf and 0.0 < self.low <= self.high < math.inf
        ):
            return  # which is what looking at each would say
        for name in ("value", "low", "high"):
            object.__setattr__(self, name, checks.number(getattr(self, name), f"speedup {name}"))
        if self.low > self.high:
            raise ValueError(f"the speedup's interval is upside down: {self.low} to {self.high}")

    def content(self) -> list[Json]:
        return [self.value, self.low, self.high]

    @classmethod
    def of(cls, content: object) -> Speedup | None:
        """From `content`, or None from null. Raises ValueError."""
        if content is None:
            return None
        if not checks.is_list(content) or len(content) != 3:
            raise ValueError(f"not a speedup and its interval: {checks.quoted(content)}")
        return cls(*content)


@dataclass(frozen=True)
class Again:
    """A finalist's second contest, in a fresh process, with nobody but the default: interleaved samples of both, ms."""

    speedup: Speedup
    samples_ms: tuple[float, ...]
    default_samples_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        _instance(self.speedup, Speedup, "speedup")
        for name in ("samples_ms", "default_samples_ms"):
            object.__setattr__(self, name, _samples(getattr(self, name)))

    def content(self) -> dict[str, Json]:
        return {
            "speedup": self.speedup.content(),
            "samples_ms": list(self.samples_ms),
            "default_samples_ms": list(self.default_samples_ms),
        }

    @classmethod
    def of(cls, content: object) -> Again | None:
        """From `content`, or None from null. Raises ValueError."""
        if content is None:
            return None
        fields = checks.fields(content, "second contest", ("speedup", "samples_ms", "default_samples_ms"))
        return cls(Speedup.of(fields["speedup"]), fields["samples_ms"], fields["default_samples_ms"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Finalist:
    """A candidate that was found right and compared with the others, thoroughly.

    time_ms:      median of `samples_ms`, its samples interleaved with the other finalists'; None where it never ran.
    speedup:      against the default, in that contest. again: in its second contest, if it had one.
    predicted_ms: by the performance model, of one that never ran.
    code:         hex digest of its machine code; "" where it is not ours, or was not kept.
    default:      whether it is the default config of the op's own kernel.
    """

    implementation: str
    config: Mapping[str, ConfigValue]
    time_ms: float | None = None
    speedup: Speedup | None = None
    samples_ms: tuple[float, ...] = ()
    again: Again | None = None
    predicted_ms: float | None = None
    code: str = ""
    default: bool = False

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen for its users, not for its own normal form
        checks.name(self.implementation, "implementation")
        put(self, "config", checks.config(self.config))
        for name in ("time_ms", "predicted_ms"):
            if getattr(self, name) is not None:
                value = checks.number(getattr(self, name), name)
                if value == 0:
                    raise ValueError(f"{name} of a finalist is zero")
                put(self, name, value)
        put(self, "samples_ms", _samples(self.samples_ms))
        if self.speedup is not None:
            _instance(self.speedup, Speedup, "speedup")
        if self.again is not None:
            _instance(self.again, Again, "again")
        if self.code != "":
            checks.digest(self.code, "code")
        if type(self.default) is not bool:
            raise ValueError(f"default is not a flag: {checks.quoted(self.default)}")

    @property
    def key(self) -> tuple[str, str]:
        """Which candidate it is."""
        return self.implementation, self.config_text

    @property
    def config_text(self) -> str:
        """Canonical JSON of the config."""
        return self.config.text if isinstance(self.config, checks.Config) else canonical(self.config)

    @property
    def most_characters(self) -> int:
        """A bound of how long its canonical JSON is."""
        second = 0 if self.again is None else len(self.again.samples_ms) + len(self.again.default_samples_ms) + 4
        return 512 + 160 * len(self.config) + 32 * (len(self.samples_ms) + second)

    def content(self) -> dict[str, Json]:
        return {
            "implementation": self.implementation,
            "config": dict(self.config),
            "time_ms": self.time_ms,
            "speedup": None if self.speedup is None else self.speedup.content(),
            "samples_ms": list(self.samples_ms),
            "again": None if self.again is None else self.again.content(),
            "predicted_ms": self.predicted_ms,
            "code": self.code,
            "default": self.default,
        }

    @classmethod
    def of(cls, content: object) -> Finalist:
        """From `content`. Raises ValueError."""
        fields = checks.fields(content, "finalist", tuple(cls.__dataclass_fields__))
        if type(fields["config"]) is dict:
            fields["config"] = checks.config_of(canonical(fields["config"]))
        fields["speedup"], fields["again"] = Speedup.of(fields["speedup"]), Again.of(fields["again"])
        return cls(**fields)


@dataclass(frozen=True)
class Verdict:
    """What dispatch serves for a problem on a device, with the evidence.

    kernel:          hex digest of the source of the op's own kernel when this was found.
    finalists:       best first: the winner, then the others, fastest first; what to fall back on, in this order.
    default_time_ms: of the default, in the same contest. interval: the winner's speed-up by both of its contests. Of an
                     observed one both are of PyTorch's own call, which is timed in a program beside the candidates.
    mode:            how calls were timed, one of MODES.
    sources:         the source digest that each implementation of ours had, or the package and version of others'.
    notes:           how it was found: counts, seconds, the spaces that were searched. Plain JSON, not for serving.
    origin:          who put it here: "local", "observed" (a running program), "imported", "shipped". Only a `trusted`
                     verdict may be served.
    """

    op: str
    problem: str
    device: Device
    environment: Environment
    kernel: str
    status: VerdictStatus
    finalists: tuple[Finalist, ...]
    default_time_ms: float | None = None
    interval: Speedup | None = None
    mode: str = "graph"
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Json] = field(default_factory=dict)
    origin: str = "local"
    trusted: bool = True
    created_at: datetime = field(default_factory=now)

    def __post_init__(self) -> None:
        check_key(self.op, self.problem, self.device, self.environment, self.kernel)
        checks.name(self.origin, "origin")
        if type(self.trusted) is not bool:
            raise ValueError(f"trusted is not a flag: {checks.quoted(self.trusted)}")
        if self.mode not in MODES:
            raise ValueError(f"mode is none of {', '.join(MODES)}: {checks.quoted(self.mode)}")
        put = object.__setattr__
        put(self, "status", VerdictStatus(self.status))
        put(self, "default_time_ms", checks.optional_number(self.default_time_ms, "default_time_ms"))
        _instance(self.interval, Speedup | None, "interval")
        put(self, "finalists", _ranked(self.finalists))
        put(self, "sources", checks.sources(self.sources))
        put(self, "notes", notes(self.notes))
        put(self, "created_at", checks.utc(self.created_at, "created_at"))
        check_contest(self.status, self.finalists, self.default_time_ms, self.interval)

    @property
    def winner(self) -> Finalist:
        return self.finalists[0]

    @property
    def implementation(self) -> str:
        return self.winner.implementation

    @property
    def config(self) -> Mapping[str, ConfigValue]:
        return self.winner.config

    @property
    def time_ms(self) -> float | None:
        return self.winner.time_ms

    @property
    def speedup(self) -> float | None:
        return None if self.interval is None else self.interval.value

    @property
    def speedup_low(self) -> float | None:
        return None if self.interval is None else self.interval.low

    @property
    def speedup_high(self) -> float | None:
        return None if self.interval is None else self.interval.high

    @property
    def measured(self) -> bool:
        """Whether a GPU was asked: the status is MEASURED or DEFAULT."""
        return self.status is not VerdictStatus.PREDICTED

    @property
    def place(self) -> tuple[str, str, str, str, int, str]:
        """Its key, by which verdicts are sorted; a registry holds one verdict on each."""
        device = self.device
        return self.op, self.problem, device.name, device.arch, device.sm_count, self.kernel

    def ranking(self) -> list[tuple[str, dict[str, ConfigValue]]]:
        """The finalists' implementations and configs, best first."""
        return [(each.implementation, dict(each.config)) for each in self.finalists]

    def source_of(self, implementation: str) -> str:
        """The digest of the source that this implementation had; the op's kernel where the verdict has no other."""
        return self.sources.get(implementation, self.kernel)

    def portable(self) -> dict[str, Json]:
        """The content another machine can use: all but `origin` and `trusted`, which every registry decides itself."""
        return {
            "op": self.op,
            "problem": self.problem,
            "device": self.device.content(),
            "environment": self.environment.content(),
            "kernel": self.kernel,
            "status": self.status.value,
            "finalists": [each.content() for each in self.finalists],
            "default_time_ms": self.default_time_ms,
            "interval": None if self.interval is None else self.interval.content(),
            "mode": self.mode,
            "sources": dict(self.sources),
            "notes": dict(self.notes),
            "created_at": checks.time_text(self.created_at),
        }

    def content(self) -> dict[str, Json]:
        return {**self.portable(), "origin": self.origin, "trusted": self.trusted}

    @property
    def sha256(self) -> str:
        return digest_of(self.content())


class Timed(Protocol):
    """What of a finalist says how fast it is."""

    @property
    def time_ms(self) -> float | None: ...

    @property
    def predicted_ms(self) -> float | None: ...

    @property
    def default(self) -> bool: ...


def check_contest(
    status: VerdictStatus, finalists: Sequence[Timed], default_time_ms: float | None, interval: Speedup | None
) -> None:
    """Raises ValueError unless a measured verdict has its numbers, and a predicted one none that a GPU would give."""
    numbers = finalists[0].time_ms, default_time_ms, interval
    measured = status is not VerdictStatus.PREDICTED
    if measured and not all(numbers):
        raise ValueError(f"a verdict of status {status} lacks its times or its speed-up")
    if not measured and any(each is not None for each in numbers):
        raise ValueError("a prediction cannot have measured times")
    if sum(each.default for each in finalists) > 1:
        raise ValueError("there are two defaults")
    for each in finalists:
        if each.default and each.time_ms != default_time_ms:
            raise ValueError(f"the default took {each.time_ms} ms, and {default_time_ms}")


def slowness(finalist: Timed) -> float:
    """What finalists are ranked by, all but the winner: those that never ran by what was predicted."""
    return next((ms for ms in (finalist.time_ms, finalist.predicted_ms) if ms is not None), float("inf"))


def _ranked(value: object) -> tuple[Finalist, ...]:
    """The winner as it is, the others fastest first; those that never ran by what was predicted."""
    if not isinstance(value, Sequence) or not 1 <= len(value) <= MOST_FINALISTS:
        raise ValueError(f"finalists are not a list of 1 to {MOST_FINALISTS}")
    for each in value:
        _instance(each, Finalist, "a finalist")
    if len({each.key for each in value}) != len(value):
        raise ValueError("a finalist stands twice")
    ranked = (value[0], *sorted(value[1:], key=slowness))
    if sum(each.most_characters for each in ranked) > checks.MAX_JSON and (
        len(canonical([each.content() for each in ranked])) > checks.MAX_JSON
    ):
        raise ValueError(f"the finalists are longer than {checks.MAX_JSON} characters")
    return ranked


def _samples(value: object) -> tuple[float, ...]:
    if not checks.is_list(value) or len(value) > checks.MAX_SAMPLES:
        raise ValueError(f"samples are not a list of at most {checks.MAX_SAMPLES} numbers")
    if not value:
        return ()
    if set(map(type, value)) == {float} and min(value) > 0.0 and math.isfinite(sum(value)):
        return tuple(value)  # which is what looking at each would say
    return tuple(checks.number(sample, "a sample") for sample in value)


def _instance(value: object, kind: Any, what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} has a wrong value: {checks.quoted(value)}")
