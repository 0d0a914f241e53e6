"""Records to rows and back. A row comes back as a record only when its digest is that of the record it spells."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from tilebook.registry import served
from tilebook.registry.checks import DAMAGE, time_text
from tilebook.registry.codec import miss_from, trial_from, verdict_from
from tilebook.registry.columns import REVOCATION, revocation_in
from tilebook.registry.models import (
    Base,
    DeviceRow,
    FinalistRow,
    MissRow,
    ProblemRow,
    RevocationRow,
    TrialRow,
    VerdictRow,
)
from tilebook.registry.records import Device, Miss, Revocation, Trial
from tilebook.registry.verdict import Verdict

_Row = TypeVar("_Row", bound=Base)


class Keys:
    """Finds or adds the small rows that records share; lives as long as one write transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._ids: dict[tuple[object, ...], int] = {}

    def device(self, device: Device) -> int:
        return self._id(DeviceRow, name=device.name, arch=device.arch, sm_count=device.sm_count)

    def problem(self, op: str, key: str) -> int:
        return self._id(ProblemRow, op=op, key=key)

    def _id(self, model: type[_Row], **columns: str | int) -> int:
        memo = (model, *columns.values())
        if memo not in self._ids:
            row = self._session.execute(select(model).filter_by(**columns)).scalar_one_or_none()
            if row is None:
                row = model(**columns)
                self._session.add(row)
                self._session.flush()
            self._ids[memo] = row.id  # type: ignore[attr-defined]
        return self._ids[memo]


def trial_of(row: TrialRow) -> Trial | None:
    """None where the row is damaged."""
    try:
        trial = trial_from(
            {
                **_keys(row),
                "implementation": row.implementation,
                "config": json.loads(row.config),
                "status": row.status,
                "time_ms": row.time_ms,
                "created_at": time_text(row.created_at),
                "failure": row.failure,
                "reason": row.reason,
                "samples_ms": json.loads(row.samples_ms),
                "facts": json.loads(row.facts),
            }
        )
    except DAMAGE:
        return None
    return trial if trial.sha256 == row.sha256 else None


def verdict_of(row: VerdictRow) -> Verdict | None:
    """None where the row, or one of its finalists, is damaged."""
    try:
        verdict = verdict_from(
            {
                **_keys(row),
                "status": row.status,
                "finalists": [_finalist(each, place) for place, each in enumerate(row.finalists)],
                "default_time_ms": row.default_time_ms,
                "interval": _speedup(row),
                "mode": row.mode,
                "sources": json.loads(row.sources),
                "notes": json.loads(row.notes),
                "created_at": time_text(row.created_at),
            },
            origin=row.origin,
            trusted=row.trusted,
        )
    except DAMAGE:
        return None
    return verdict if (verdict.sha256, served.digest(verdict)) == (row.sha256, row.served) else None


def _finalist(row: FinalistRow, place: int) -> dict[str, Any]:
    if row.place != place:
        raise ValueError("a finalist is missing")
    return {
        "implementation": row.implementation,
        "config": json.loads(row.config),
        "time_ms": row.time_ms,
        "speedup": _speedup(row),
        "samples_ms": json.loads(row.samples_ms),
        "again": json.loads(row.again),
        "predicted_ms": row.predicted_ms,
        "code": row.code,
        "default": row.is_default,
    }


def _speedup(row: VerdictRow | FinalistRow) -> list[float | None] | None:
    values = [row.speedup, row.speedup_low, row.speedup_high]
    return None if values == [None] * 3 else values


def revocation_of(row: RevocationRow) -> Revocation | None:
    """None where the row is damaged."""
    return revocation_in([getattr(row, name) for name in REVOCATION])


def miss_of(row: MissRow) -> Miss | None:
    """None where the row is damaged."""
    try:
        miss = miss_from(
            {
                "op": row.problem.op,
                "problem": row.problem.key,
                "device": _device(row.device),
                "calls": row.calls,
                "time_ms": row.time_ms,
                "last_seen": time_text(row.last_seen),
            }
        )
    except DAMAGE:
        return None
    return miss if miss.sha256 == row.sha256 else None


def _device(row: DeviceRow) -> dict[str, Any]:
    return {"name": row.name, "arch": row.arch, "sm_count": row.sm_count}


def _keys(row: TrialRow | VerdictRow) -> dict[str, Any]:
    if row.problem.op != row.kernel.op:
        raise ValueError("the problem and the kernel belong to different ops")
    return {
        "op": row.problem.op,
        "problem": row.problem.key,
        "device": _device(row.device),
        "environment": json.loads(row.environment.versions),
        "kernel": row.kernel.digest,
    }
