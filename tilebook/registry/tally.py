"""Misses added to a registry's ledger, in the caller's transaction. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from tilebook.registry.checks import DAMAGE, time_text
from tilebook.registry.codec import miss_from
from tilebook.registry.records import Miss
from tilebook.registry.shared import Shared
from tilebook.registry.sql import Sql


def tally(sql: Sql, misses: Iterable[Miss]) -> None:
    """Adds their calls; the estimate of the time of a call and `last_seen` are the newest. No schema has changed this
    table."""
    shared = Shared(sql)
    for miss in misses:
        ids = shared.problem(miss.op, miss.problem), shared.device(miss.device)
        where = "WHERE problem_id = ? AND device_id = ?"
        rows = sql.rows(f"SELECT calls, time_ms, last_seen, sha256 FROM miss {where}", ids)
        known = _known(miss, rows[0]) if rows else None
        whole = miss if known is None else miss.plus(known)
        sql.run(f"DELETE FROM miss {where}", ids)
        row = {
            "problem_id": ids[0],
            "device_id": ids[1],
            "sha256": whole.sha256,
            "calls": whole.calls,
            "time_ms": whole.time_ms,
            "last_seen": sql.time(whole.last_seen),
        }
        sql.insert("miss", row, [list(row.values())])


def _known(miss: Miss, row: Sequence[Any]) -> Miss | None:
    """What the ledger has of this problem; None where the row is damaged."""
    calls, time_ms, at, sha256 = row
    last_seen = time_text(at) if isinstance(at, datetime) else at
    try:
        found = miss_from({**miss.content(), "calls": calls, "time_ms": time_ms, "last_seen": last_seen})
    except DAMAGE:
        return None
    return found if found.sha256 == sha256 else None
