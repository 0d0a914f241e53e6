"""A verdict from flat fields and the evidence as one object, for tests that are about one winner and its rivals."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tilebook.registry import Device, Environment, Verdict
from tilebook.registry.checks import time_text
from tilebook.registry.codec import verdict_from
from tilebook.registry.legacy import FIELDS, lifted

NUMBERS = {"time_ms": 1.0, "default_time_ms": 2.0, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1}


def flat_verdict(**fields: Any) -> Verdict:
    """The fields of `legacy.FIELDS`, `origin` and `trusted`; a prediction has no times whatever they say."""
    origin, trusted = fields.pop("origin", "local"), fields.pop("trusted", True)
    device, environment = fields.pop("device"), fields.pop("environment")
    assert isinstance(device, Device)
    assert isinstance(environment, Environment)
    numbers = dict.fromkeys(NUMBERS) if fields["status"] == "predicted" else {**NUMBERS, **fields}
    created_at = fields.pop("created_at", datetime(2026, 11, 21, tzinfo=UTC))
    content = {
        **fields,
        **{name: numbers[name] for name in NUMBERS},
        "status": str(fields["status"]),
        "config": dict(fields["config"]),
        "evidence": fields.get("evidence", {}),
        "device": device.content(),
        "environment": environment.content(),
        "created_at": time_text(created_at),
    }
    return verdict_from(lifted({name: content[name] for name in FIELDS}), origin=origin, trusted=trusted)
