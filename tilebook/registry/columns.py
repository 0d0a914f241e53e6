"""Records as values of the columns of their tables; times are aware datetimes. Standard library only."""

from __future__ import annotations

from typing import Any

from tilebook.registry import served
from tilebook.registry.checks import canonical
from tilebook.registry.records import Revocation, Trial
from tilebook.registry.verdict import Finalist, Speedup, Verdict


def trial_columns(trial: Trial, origin: str) -> dict[str, Any]:
    """All but the ids of the rows that it shares."""
    return {
        "sha256": trial.sha256,
        "origin": origin,
        "implementation": trial.implementation,
        "config": canonical(trial.config),
        "status": trial.status.value,
        "failure": None if trial.failure is None else trial.failure.value,
        "reason": trial.reason,
        "time_ms": trial.time_ms,
        "samples_ms": canonical(trial.samples_ms),
        "facts": canonical(trial.facts),
        "created_at": trial.created_at,
    }


def verdict_columns(verdict: Verdict) -> dict[str, Any]:
    """All but the ids of the rows that it shares."""
    return {
        "sha256": verdict.sha256,
        "served": served.digest(verdict),
        "status": verdict.status.value,
        "mode": verdict.mode,
        "default_time_ms": verdict.default_time_ms,
        **_speedup_columns(verdict.interval),
        "sources": canonical(verdict.sources),
        "origin": verdict.origin,
        "trusted": verdict.trusted,
        "created_at": verdict.created_at,
        "notes": canonical(verdict.notes),
    }


def finalist_columns(finalist: Finalist, place: int) -> dict[str, Any]:
    return {
        "place": place,
        "implementation": finalist.implementation,
        "config": canonical(finalist.config),
        "time_ms": finalist.time_ms,
        "code": finalist.code,
        "predicted_ms": finalist.predicted_ms,
        "is_default": finalist.default,
        **_speedup_columns(finalist.speedup),
        "samples_ms": canonical(finalist.samples_ms),
        "again": canonical(None if finalist.again is None else finalist.again.content()),
    }


def _speedup_columns(speedup: Speedup | None) -> dict[str, float | None]:
    names = ("value", "low", "high")
    values = [None if speedup is None else getattr(speedup, name) for name in names]
    return dict(zip(("speedup", "speedup_low", "speedup_high"), values, strict=True))


def revocation_columns(revocation: Revocation) -> dict[str, Any]:
    return {
        "sha256": revocation.sha256,
        "scope": revocation.scope,
        "op": revocation.op,
        "implementation": revocation.implementation,
        "kernel": revocation.kernel,
        "arch": revocation.arch,
        "triton": revocation.triton,
        "config": canonical(revocation.config),
        "reason": revocation.reason,
        "origin": revocation.origin,
        "trusted": revocation.trusted,
        "created_at": revocation.created_at,
    }
