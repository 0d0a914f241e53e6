"""The records a registry holds. They check themselves: one that exists can be stored, exported and read back.

A wrong value raises ValueError. Free text is made printable and cut to length instead: a compiler's message is kept
however ugly it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property

from tilebook.registry import checks
from tilebook.registry.checks import ConfigValue, Json, canonical
from tilebook.registry.notes import made

__all__ = [
    "ConfigValue",
    "Device",
    "Environment",
    "Failure",
    "Json",
    "Miss",
    "Revocation",
    "Status",
    "Trial",
    "canonical",
]


class Status(StrEnum):
    """How a trial ended: it passed, it was turned away by a rule, or it broke."""

    OK = "ok"
    REJECTED = "rejected"
    FAILED = "failed"


class Failure(StrEnum):
    """The class of a trial's failure or rejection; `Trial.reason` has the words."""

    INFEASIBLE = "infeasible"
    COMPILE_ERROR = "compile_error"
    COMPILE_TIMEOUT = "compile_timeout"
    OUT_OF_RESOURCES = "out_of_resources"
    SPILLS = "spills"
    DUPLICATE_BINARY = "duplicate_binary"
    WRONG_ANSWER = "wrong_answer"
    NOT_REPEATABLE = "not_repeatable"
    RUN_ERROR = "run_error"
    RUN_TIMEOUT = "run_timeout"
    WORKER_DIED = "worker_died"
    SLOW = "slow"
    UNAVAILABLE = "unavailable"


def now() -> datetime:
    return datetime.now(UTC)


def digest_of(content: Json) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


@dataclass(frozen=True)
class Device:
    """A GPU model, the hard key of everything measured on it: ("NVIDIA H200", "sm_90", 132)."""

    name: str
    arch: str
    sm_count: int

    def __post_init__(self) -> None:
        checks.label(self.name, "device name")
        checks.name(self.arch, "device arch")
        checks.integer(self.sm_count, "device sm_count", 1, 100_000)

    def content(self) -> dict[str, Json]:
        return {"name": self.name, "arch": self.arch, "sm_count": self.sm_count}

    @cached_property
    def text(self) -> str:
        """Canonical JSON of `content`."""
        return canonical(self.content())

    @property
    def sha256(self) -> str:
        return digest_of(self.content())


@dataclass(frozen=True)
class Environment:
    """The software a measurement was made with: {"driver": "580.65.06", "triton": "3.6.0", ...}, the soft key."""

    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", checks.versions(self.versions))

    def __hash__(self) -> int:
        return hash(self.digest)

    def content(self) -> dict[str, Json]:
        return dict(self.versions)

    @property
    def sha256(self) -> str:
        return digest_of(self.content())

    @cached_property
    def text(self) -> str:
        """Canonical JSON of `content`."""
        return canonical(self.content())

    @cached_property
    def digest(self) -> str:
        """64 hex digits that two machines share exactly when every version is the same."""
        return self.sha256


@dataclass(frozen=True)
class Trial:
    """One candidate (implementation and config) on one problem, device and environment.

    `problem` is canonical JSON text, `kernel` the hex digest of the kernel's source, times are milliseconds.
    `failure` is None exactly when `status` is OK.
    """

    op: str
    problem: str
    device: Device
    environment: Environment
    kernel: str
    implementation: str
    config: Mapping[str, ConfigValue]
    status: Status
    failure: Failure | None = None
    reason: str = ""
    time_ms: float | None = None
    samples_ms: tuple[float, ...] = ()
    facts: Mapping[str, Json] = field(default_factory=dict)
    created_at: datetime = field(default_factory=now)

    def __post_init__(self) -> None:
        check_key(self.op, self.problem, self.device, self.environment, self.kernel)
        checks.name(self.implementation, "implementation")
        put = object.__setattr__  # the dataclass is frozen for its users, not for its own normal form
        put(self, "config", checks.config(self.config))
        put(self, "status", Status(self.status))
        put(self, "failure", None if self.failure is None else Failure(self.failure))
        if (self.failure is None) != (self.status is Status.OK):
            raise ValueError(f"a trial of status {self.status} cannot have failure {self.failure}")
        put(self, "reason", checks.text(self.reason, "reason"))
        put(self, "time_ms", checks.optional_number(self.time_ms, "time_ms"))
        if len(self.samples_ms) > checks.MAX_SAMPLES:
            raise ValueError(f"more than {checks.MAX_SAMPLES} samples")
        put(self, "samples_ms", tuple(checks.number(sample, "a sample") for sample in self.samples_ms))
        put(self, "facts", checks.json_object(self.facts, "facts"))
        put(self, "created_at", checks.utc(self.created_at, "created_at"))

    def content(self) -> dict[str, Json]:
        return {
            "op": self.op,
            "problem": self.problem,
            "device": self.device.content(),
            "environment": self.environment.content(),
            "kernel": self.kernel,
            "implementation": self.implementation,
            "config": dict(self.config),
            "status": self.status.value,
            "failure": None if self.failure is None else self.failure.value,
            "reason": self.reason,
            "time_ms": self.time_ms,
            "samples_ms": list(self.samples_ms),
            "facts": dict(self.facts),
            "created_at": checks.time_text(self.created_at),
        }

    @cached_property
    def texts(self) -> tuple[str, str, str]:
        """Canonical JSON of config, samples and facts, which are columns of their own."""
        return canonical(self.config), canonical(self.samples_ms), canonical(self.facts)

    @cached_property
    def text(self) -> str:
        """Canonical JSON of `content`, of which the parts are there."""
        config, samples_ms, facts = self.texts
        failure = "null" if self.failure is None else f'"{self.failure.value}"'
        return (
            f'{{"config":{config},"created_at":"{checks.time_text(self.created_at)}","device":{self.device.text},'
            f'"environment":{self.environment.text},"facts":{facts},"failure":{failure},'
            f'"implementation":"{self.implementation}","kernel":"{self.kernel}","op":"{self.op}",'
            f'"problem":{canonical(self.problem)},"reason":{canonical(self.reason)},"samples_ms":{samples_ms},'
            f'"status":"{self.status.value}","time_ms":{canonical(self.time_ms)}}}'
        )

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Revocation:
    """What may not run any more: an implementation of an op, or those of its configs that have all these values.

    None means any, for `kernel` (the digest of the kernels' source), `arch` ("sm_90") and `triton` ("<3.7,>=3.6"); no
    config means every config. `made` says who did it, see `provenance`. `origin` and `trusted` as for a verdict: only a
    `trusted` revocation is honoured.
    """

    op: str
    implementation: str
    reason: str
    kernel: str | None = None
    arch: str | None = None
    triton: str | None = None
    config: Mapping[str, ConfigValue] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    origin: str = "local"
    trusted: bool = True
    created_at: datetime = field(default_factory=now)

    def __post_init__(self) -> None:
        checks.name(self.op, "op")
        checks.name(self.implementation, "implementation")
        if self.implementation == "torch":
            raise ValueError("torch is what runs where nothing else may, and cannot be revoked")
        put = object.__setattr__
        put(self, "reason", checks.text(self.reason, "reason"))
        if not self.reason.strip():
            raise ValueError("a revocation needs a reason")
        if self.kernel is not None:
            checks.digest(self.kernel, "kernel")
        if self.arch is not None:
            checks.name(self.arch, "arch")
        put(self, "triton", None if self.triton is None else checks.version_range(self.triton, "triton"))
        put(self, "config", checks.config(self.config))
        put(self, "made", made(self.made))
        checks.name(self.origin, "origin")
        if type(self.trusted) is not bool:
            raise ValueError(f"trusted is not a flag: {checks.quoted(self.trusted)}")
        put(self, "created_at", checks.utc(self.created_at, "created_at"))

    def covers(
        self, op: str, kernel: str, arch: str, triton: str, implementation: str, config: Mapping[str, ConfigValue]
    ) -> bool:
        """Whether this candidate may not run: all that the revocation names fits. An unknown Triton is in any range."""
        return (
            (self.op, self.implementation) == (op, implementation)
            and self.kernel in (None, kernel)
            and self.arch in (None, arch)
            and (self.triton is None or checks.in_range(triton, self.triton))
            and self.config.items() <= config.items()
        )

    def _scope(self) -> dict[str, Json]:
        return {
            "op": self.op,
            "implementation": self.implementation,
            "kernel": self.kernel,
            "arch": self.arch,
            "triton": self.triton,
            "config": dict(self.config),
        }

    @property
    def scope(self) -> str:
        """64 hex digits that name what is revoked, whoever does it and why; a registry holds each scope once."""
        return digest_of(self._scope())

    def portable(self) -> dict[str, Json]:
        """The content another machine can use, all but `origin` and `trusted`, which every registry decides itself."""
        made: dict[str, Json] = {"made": dict(self.made)} if self.made else {}
        return {**self._scope(), "reason": self.reason, "created_at": checks.time_text(self.created_at), **made}

    def content(self) -> dict[str, Json]:
        return {**self.portable(), "origin": self.origin, "trusted": self.trusted}

    @property
    def sha256(self) -> str:
        return digest_of(self.content())


@dataclass(frozen=True)
class Miss:
    """A problem that model code asked for and no verdict covers; `time_ms` is the estimated GPU time of one call."""

    op: str
    problem: str
    device: Device
    calls: int
    time_ms: float
    last_seen: datetime = field(default_factory=now)

    def __post_init__(self) -> None:
        checks.name(self.op, "op")
        checks.problem(self.problem)
        if not isinstance(self.device, Device):
            raise ValueError(f"device is not a Device: {checks.quoted(self.device)}")
        checks.integer(self.calls, "calls", 1, 2**62)
        object.__setattr__(self, "time_ms", checks.number(self.time_ms, "time_ms"))
        object.__setattr__(self, "last_seen", checks.utc(self.last_seen, "last_seen"))

    def plus(self, other: Miss) -> Miss:
        """The calls of both, with the newest estimate of the time of a call and the newest `last_seen`."""
        timed = max(self, other, key=lambda each: (not isinstance(each, Guess), each.last_seen, each.time_ms))
        calls = min(self.calls + other.calls, 2**62)
        return replace(timed, calls=calls, last_seen=max(self.last_seen, other.last_seen))

    def content(self) -> dict[str, Json]:
        return {
            "op": self.op,
            "problem": self.problem,
            "device": self.device.content(),
            "calls": self.calls,
            "time_ms": self.time_ms,
            "last_seen": checks.time_text(self.last_seen),
        }

    @property
    def sha256(self) -> str:
        return digest_of(self.content())


class Guess(Miss):
    """One of which no call was timed: what a registry says of the problem's time stays."""


def check_key(op: str, problem: str, device: Device, environment: Environment, kernel: str) -> None:
    checks.name(op, "op")
    checks.problem(problem)
    if not isinstance(device, Device):
        raise ValueError(f"device is not a Device: {checks.quoted(device)}")
    if not isinstance(environment, Environment):
        raise ValueError(f"environment is not an Environment: {checks.quoted(environment)}")
    checks.digest(kernel, "kernel")
