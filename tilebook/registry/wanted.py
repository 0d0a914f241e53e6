"""Which verdicts somebody asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilebook.registry.checks import called
from tilebook.registry.records import Device
from tilebook.registry.verdict import Verdict


@dataclass(frozen=True)
class Wanted:
    """Which verdicts; None means any. gpu: words of the GPU's name, see `checks.called`."""

    op: str | None = None
    problem: str | None = None
    device: Device | None = None
    kernel: str | None = None
    gpu: str | None = None

    def has(self, verdict: Verdict) -> bool:
        """Is the verdict wanted?"""
        device = verdict.device
        return (
            self.op in (None, verdict.op)
            and self.problem in (None, verdict.problem)
            and self.kernel in (None, verdict.kernel)
            and self.is_on([device.name, device.arch, device.sm_count])
        )

    def is_on(self, device: Sequence[Any]) -> bool:
        """Are verdicts wanted that are for this device, by name, arch and SM count?"""
        exact = self.device is None or list(device) == [self.device.name, self.device.arch, self.device.sm_count]
        return exact and (not self.gpu or called(self.gpu, str(device[0])))


ANY = Wanted()
