"""Records as values of the columns of their tables; times are aware datetimes. Standard library only."""

from __future__ import annotations

from typing import Any

from tilebook.registry.checks import canonical
from tilebook.registry.records import Revocation, Trial


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
