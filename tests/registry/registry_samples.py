"""Records to test with; every call with other arguments gives another record."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tilebook.registry import (
    Again,
    Device,
    Environment,
    Failure,
    Finalist,
    Miss,
    Registry,
    Revocation,
    Speedup,
    Status,
    Trial,
    Verdict,
    VerdictStatus,
    canonical,
    legacy,
)

H200 = Device("NVIDIA H200", "sm_90", 132)
A100 = Device("NVIDIA A100-SXM4-80GB", "sm_80", 108)
SOFTWARE = Environment({"driver": "580.65.06", "triton": "3.6.0", "torch": "2.13.0+cu130"})
KERNEL = "0123456789abcdef"
START = datetime(2026, 11, 21, 12, 0, 0, 123456, tzinfo=UTC)


def problem(rows: int = 128) -> str:
    return canonical({"rows": rows, "dtype": "bf16", "causal": True})


def trial(number: int = 0, **changes: Any) -> Trial:
    base = Trial(
        op="rms_norm_fwd",
        problem=problem(),
        device=H200,
        environment=SOFTWARE,
        kernel=KERNEL,
        implementation="triton",
        config={"BLOCK_M": 64, "num_warps": 4, "use_tma": True, "order": "row-major"},
        status=Status.OK,
        time_ms=0.1 + number / 3,
        samples_ms=(0.1, 0.2 + number / 7, 1e-9),
        facts={"shared_bytes": 49152, "compile_s": 0.35, "nested": {"spills": [0, 1, None]}},
        created_at=START + timedelta(seconds=number),
    )
    return replace(base, **changes)


def broken_trial(**changes: Any) -> Trial:
    return trial(
        status=Status.FAILED,
        failure=Failure.COMPILE_ERROR,
        reason="line 1\n\tü \x00\x1b[31mred",
        time_ms=None,
        samples_ms=(),
        **changes,
    )


def verdict(**changes: Any) -> Verdict:
    """`changes` may name the winner's `implementation`, `config` and `time_ms` too."""
    first = {"implementation": "triton", "config": {"BLOCK_M": 128, "num_warps": 8}, "time_ms": 0.1}
    winner = Finalist(**{name: changes.pop(name, value) for name, value in first.items()})
    fields = {
        "op": "rms_norm_fwd",
        "problem": problem(),
        "device": H200,
        "environment": SOFTWARE,
        "kernel": KERNEL,
        "status": VerdictStatus.MEASURED,
        "finalists": (winner,),
        "default_time_ms": 0.123,
        "interval": Speedup(1.23, 1.2, 1.26),
        "notes": {"tried": 7},
        "created_at": START,
    }
    return Verdict(**{**fields, **changes})


def predicted(**changes: Any) -> Verdict:
    nothing = {"time_ms": None, "default_time_ms": None, "interval": None, "notes": {}}
    return verdict(status=VerdictStatus.PREDICTED, **nothing, **changes)


def evidenced(**changes: Any) -> Verdict:
    """One with all that a verdict can have: losers, the default among them, samples, a second contest, sources."""
    speedup = Speedup(1.1, 1.05, 1.15)
    winner = Finalist(
        "triton",
        {"BLOCK_M": 128, "num_warps": 8},
        time_ms=0.1,
        speedup=speedup,
        samples_ms=(0.1, 0.11, 0.1),
        again=Again(speedup, (0.1, 0.2), (0.3, 0.4)),
        code="ab" * 32,
    )
    default = Finalist("triton", {"BLOCK_M": 64}, 0.123, Speedup(1, 1, 1), (0.12, 0.123, 0.13), default=True)
    return verdict(
        **{
            "finalists": (winner, Finalist("torch", {}, 0.11), default),
            "mode": "eager",
            "sources": {"triton": KERNEL, "other": "some-package 4.0"},
            "notes": {"tried": 7, "rejected": {"slow": 3}, "busy": None, "spaces": {"triton": {"feasible": ["0f"]}}},
            **changes,
        }
    )


def revocation(**changes: Any) -> Revocation:
    base = Revocation(
        op="rms_norm_fwd",
        implementation="triton",
        reason="wrong on ragged rows",
        kernel=KERNEL,
        arch="sm_90",
        triton=">=3.6,<3.7",
        config={"BLOCK_M": 64, "num_warps": 4},
        created_at=START,
    )
    return replace(base, **changes)


def miss(rows: int = 128, calls: int = 1, time_ms: float = 1.0, **changes: Any) -> Miss:
    base = Miss("rms_norm_fwd", problem(rows), H200, calls, time_ms, START)
    return replace(base, **changes)


def signed(*records: Any, **header: Any) -> str:
    """A file whose digests are right whatever its records say: strings are lines, dicts become lines."""
    lines = [record if isinstance(record, str) else json.dumps(seal(record)) for record in records]
    body = "".join(line + "\n" for line in lines)
    head = {"format": "tilebook-registry", "version": 3, "records": len(lines)}
    head["sha256"] = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**head, **header}) + "\n" + body


def seal(record: dict[str, Any]) -> dict[str, Any]:
    content = {name: value for name, value in record.items() if name not in ("type", "sha256")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), **record}


def an_old_verdict(**changes: Any) -> dict[str, Any]:
    """As versions 1 and 2 of the format had it."""
    today = verdict(config={"BLOCK_M": 128}).portable()
    kept = {name: value for name, value in today.items() if name in legacy.FIELDS}
    old = {
        "implementation": "triton",
        "config": {"BLOCK_M": 128},
        "time_ms": 0.1,
        "speedup": 1.23,
        "speedup_low": 1.2,
        "speedup_high": 1.26,
        "evidence": {},
    }
    return {"type": "verdict", **kept, **old, **changes}


def a_trial(**changes: Any) -> dict[str, Any]:
    return {"type": "trial", **trial().content(), **changes}


def a_verdict(**changes: Any) -> dict[str, Any]:
    return {"type": "verdict", **verdict().portable(), **changes}


def a_revocation(**changes: Any) -> dict[str, Any]:
    return {"type": "revocation", **revocation().portable(), **changes}


def fill(path: Path, trials: int = 20) -> None:
    """A registry with something of everything."""
    with Registry.open(path, write=True) as registry:
        registry.record([trial(number) for number in range(trials)], verdict())
        registry.revoke(revocation())
        registry.count_misses([miss()])


def execute(path: Path, *statements: str) -> None:
    """SQL, behind the registry's back."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()
