"""Which records a command is about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from tilebook.registry.checks import called
from tilebook.registry.records import Revocation, Trial

if TYPE_CHECKING:
    from tilebook.registry.overview import Shown
    from tilebook.registry.quick import Line


@dataclass(frozen=True)
class Selection:
    """What all of these fit that are given.

    gpu:           words of the GPU's name, see `checks.called`.
    since, before: when the record was made: not before the one, before the other.
    origin:        who put it there.
    measured:      leaves out predictions.
    trusted:       leaves out verdicts and revocations of strangers.
    """

    op: str | None = None
    gpu: str | None = None
    dtype: str | None = None
    since: datetime | None = None
    before: datetime | None = None
    origin: str | None = None
    measured: bool = False
    trusted: bool = False

    @property
    def everything(self) -> bool:
        return self == Selection()

    def verdict(self, verdict: Shown | Line) -> bool:
        its = self.origin in (None, verdict.origin) and (verdict.measured or not self.measured)
        return its and (verdict.trusted or not self.trusted) and self._about(verdict)

    def trial(self, trial: Trial) -> bool:
        """Of who put it there a trial says nothing."""
        return (trial.time_ms is not None or not self.measured) and self._about(trial)

    def revocation(self, revocation: Revocation) -> bool:
        """A revocation is about an op, on every GPU that it does not rule out, whatever is measured there."""
        return self.op in (None, revocation.op) and (revocation.trusted or not self.trusted)

    def _about(self, record: Trial | Shown | Line) -> bool:
        return (
            self.op in (None, record.op)
            and (not self.gpu or called(self.gpu, record.device.name))
            and (self.dtype is None or dtype(record.problem) == self.dtype)
            and (self.since is None or record.created_at >= self.since)
            and (self.before is None or record.created_at < self.before)
        )


def dtype(problem: str) -> str | None:
    """The dtype of a problem's key; None where it has none."""
    values = json.loads(problem)
    found = values.get("dtype") if isinstance(values, Mapping) else None
    return found if isinstance(found, str) else None
