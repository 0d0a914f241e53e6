"""Records as values of the columns of their tables; times are aware datetimes. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tilebook.registry.checks import DAMAGE, canonical, quoted, time_text
from tilebook.registry.codec import revocation_from
from tilebook.registry.records import Revocation, Trial


def trial_columns(trial: Trial, origin: str) -> dict[str, Any]:
    """All but the ids of the rows that it shares."""
    config, samples_ms, facts = trial.texts
    return {
        "sha256": trial.sha256,
        "origin": origin,
        "implementation": trial.implementation,
        "config": config,
        "status": trial.status.value,
        "failure": None if trial.failure is None else trial.failure.value,
        "reason": trial.reason,
        "time_ms": trial.time_ms,
        "samples_ms": samples_ms,
        "facts": facts,
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
        "made": canonical(revocation.made) if revocation.made else None,
        "origin": revocation.origin,
        "trusted": revocation.trusted,
        "created_at": revocation.created_at,
    }


REVOCATION = (
    "sha256",
    "scope",
    "op",
    "implementation",
    "kernel",
    "arch",
    "triton",
    "config",
    "reason",
    "origin",
    "trusted",
    "created_at",
    "made",
)


def all_revocations(schema: int) -> str:
    """The statement that gives the columns REVOCATION. All rows: a damaged one must not hide behind a condition."""
    names = [name if name != "made" or schema >= 5 else "NULL" for name in REVOCATION]
    return f"SELECT {', '.join(names)} FROM revocation"


def revocation_in(row: Sequence[Any]) -> Revocation | None:
    """The revocation of these columns; None where the row is damaged."""
    told = dict(zip(REVOCATION, row, strict=True))
    sha256, scope, origin, trusted = (told.pop(name) for name in ("sha256", "scope", "origin", "trusted"))
    try:
        if trusted not in (0, 1):
            return None
        told["config"] = json.loads(told["config"])
        told["created_at"] = time_text(at) if isinstance(at := told["created_at"], datetime) else at
        told["made"] = {} if told["made"] is None else json.loads(told["made"])
        if not told["made"]:
            del told["made"]
        revocation = revocation_from(told, origin=origin, trusted=bool(trusted))
    except DAMAGE:
        return None
    return revocation if (revocation.sha256, revocation.scope) == (sha256, scope) else None


def lost_revocation(scope: str) -> str:
    """What is said of one that is damaged."""
    return (
        f"left out a damaged revocation: what it revokes may run again;"
        f" repeat it, or remove it with --undo {quoted(scope[:8])}"
    )
