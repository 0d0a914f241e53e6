"""A run over verdicts: one after the other, as long as there is time; what came of each is stored at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tilebook import device as devices
from tilebook.errors import RegistryError, TuningError, one_line
from tilebook.op import UsageError
from tilebook.registry import DenyList, Layers, Registry, Revocation, Verdict
from tilebook.tuner.audit.check import Check, Decided, Pending
from tilebook.tuner.audit.subjects import (
    AUDIT,
    VERIFY,
    Bench,
    Finding,
    Outcome,
    Subject,
    looked,
    nearest_first,
    sampled,
    subjects,
    tuning_s,
)
from tilebook.tuner.budget import Budget
from tilebook.tuner.process.runner import GpuRunner, Limits, Runner

ROUNDS = 15
"""Interleaved samples of each candidate: half of a tune's, for differences of 2 % and more."""

_LIMITS = Limits(confirm_s=180.0)  # a contest here has five candidates at most


def bench(index: int = 0) -> Bench:
    """The GPU of this machine with that CUDA index. Raises UsageError where there is none."""
    if not devices.present():
        raise UsageError("there is no GPU here: verdicts are looked at on the GPU that they are for")
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise UsageError(f"--gpu {index}: there is no such GPU, only 0 to {count - 1}")

    def runner(mode: Any) -> Runner:
        return GpuRunner(index, mode, _LIMITS)

    return Bench(devices.current(index), devices.environment(), runner)


@dataclass
class Report:
    """What a run came to: a finding for each subject, those that were not reached included. layer: where it is kept.

    before: how many an earlier run of the same command had looked at. left_out: how many would not be served whatever
    were found, or are of kernels that were not recorded. tuning_s: seconds that tuning took for these
    verdicts, where they say it. interrupted: by Ctrl-C. seconds: that it took.
    """

    here: Bench
    layer: str
    findings: list[Finding] = field(default_factory=list)
    before: int = 0
    left_out: int = 0
    tuning_s: float | None = None
    seconds: float = 0.0
    interrupted: bool = False


Watch = Callable[[Finding, int, int], None]
"""Told of each finding, its number and how many there are."""


@dataclass
class Auditor:
    """Looks at subjects one after the other, and stores what came of each before the next is begun."""

    here: Bench
    layers: Layers
    registry: Registry
    budget: Budget
    seed: int = 0
    rounds: int = ROUNDS
    _drift: list[float] = field(default_factory=list)
    _known: dict[str, Pending] = field(default_factory=dict)
    _runners: dict[str, Runner] = field(default_factory=dict)
    _revoked: list[Revocation] = field(default_factory=list)
    _took: list[float] = field(default_factory=list)
    _expired: bool = False

    def verify(self, found: Sequence[Subject]) -> Iterator[Finding]:
        """Each in this order: verified whole, and timed with what would run in its place."""
        yield from self._each(list(found), VERIFY)

    def audit(self, found: Sequence[Subject]) -> Iterator[Finding]:
        """A look at each in a random order weighted by use, beginning with the like of what has regressed."""
        yield from self._each(sampled(found, self.seed), AUDIT)

    def _each(self, waiting: list[Subject], by: str) -> Iterator[Finding]:
        with self._limit():
            while waiting:
                if not self._time_left():
                    yield from (Finding(each, Outcome.NOT_REACHED, "the budget was spent") for each in waiting)
                    return
                subject, waiting = waiting[0], waiting[1:]
                finding = self._look(subject, by)
                if finding.outcome in (Outcome.DEMOTED, Outcome.QUARANTINED):
                    waiting = nearest_first(waiting, subject) if by == AUDIT else waiting
                yield finding

    def _time_left(self) -> bool:
        """Is there time for one more, by what the others took? The first is always begun."""
        usual = sum(self._took) / len(self._took) if self._took else 0.0
        return not self._expired and (not self._took or self.budget.left_s > usual / 2)

    def _look(self, subject: Subject, by: str) -> Finding:
        denied = DenyList(self._revoked, self.here.environment.get("triton", "")).winner(subject.verdict)
        if denied is not None:
            return Finding(subject, Outcome.QUARANTINED, denied.reason)
        began = self.budget.clock()
        try:
            known, runner = self._bench(subject.verdict.mode)
            check = Check(subject, known, self.here.gpu, runner, self.rounds, self.seed, by, self._drift)
            decided = check.whole() if by == VERIFY else check.quick()
            self._store(decided)
            finding = decided.finding
        except TuningError as broken:
            outcome = Outcome.NOT_REACHED if self._expired else Outcome.FAILED
            finding = Finding(subject, outcome, "the budget was spent" if self._expired else one_line(broken))
        seconds = self.budget.clock() - began
        self._took.append(seconds)
        return replace(finding, seconds=seconds)

    def _store(self, decided: Decided) -> None:
        verdicts = [] if decided.verdict is None else [decided.verdict]
        revocations = [] if decided.revocation is None else [decided.revocation]
        self.registry.merge(decided.trials, verdicts, revocations)
        self._revoked += revocations
        if revocations:
            self._known.clear()  # what is revoked takes part in nothing from now on

    def _bench(self, mode: str) -> tuple[Pending, Runner]:
        if mode not in self._known:
            self._known[mode] = Pending(self.registry, self.layers, self.here.gpu, self.here.environment, mode)
        if mode not in self._runners:
            self._runners[mode] = self.here.runner(mode)
        return self._known[mode], self._runners[mode]

    @contextlib.contextmanager
    def _limit(self) -> Iterator[None]:
        """Ends whatever is under way when the budget's last limit has passed, and the processes in any case."""

        def expire() -> None:
            self._expired = True
            self.close()

        timer = threading.Timer(max(0.0, self.budget.limit - self.budget.clock()), expire)
        timer.daemon = True
        if self.budget.limited:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.close()

    def close(self) -> None:
        for runner in list(self._runners.values()):
            runner.close()


def look(
    by: str,
    here: Bench,
    *,
    op: str | None = None,
    registry: str | None = None,
    budget_s: float | None = None,
    seed: int = 0,
    watch: Watch = lambda finding, number, total: None,
) -> Report:
    """Verifies or audits what there is in the registry for this GPU, and returns what came of it, also after Ctrl-C.

    Raises RegistryError where the registry cannot be written.
    """
    layers = Layers.default(registry)
    budget = Budget(budget_s, clock=here.clock)
    report = Report(here, layers.layers[0][0])
    with layers.writer() as writer:
        left_out: list[Verdict] = []
        every = subjects(layers, here, by, op, left_out)
        report.left_out = len(left_out)
        found = [each for each in every if by == VERIFY or not looked(writer, here, each)]
        report.before = len(every) - len(found)
        report.tuning_s = tuning_s(found)
        auditor = Auditor(here, layers, writer, budget, seed)
        try:
            for finding in auditor.verify(found) if by == VERIFY else auditor.audit(found):
                report.findings.append(finding)
                if finding.outcome is not Outcome.NOT_REACHED:
                    watch(finding, len(report.findings), len(found))
        except KeyboardInterrupt:
            report.interrupted = True
            auditor.close()
            reached = {id(each.subject) for each in report.findings}
            left = [each for each in found if id(each) not in reached]
            report.findings += [Finding(each, Outcome.NOT_REACHED, "interrupted") for each in left]
    report.seconds = budget.clock() - budget.began
    return report


def planned(
    by: str, here: Bench, *, op: str | None = None, registry: str | None = None, seed: int = 0
) -> list[Subject]:
    """What a run would look at, in its order; nothing is measured, and nothing written."""
    layers = Layers.default(registry)
    found = subjects(layers, here, by, op)
    if by == VERIFY:
        return found
    with contextlib.suppress(RegistryError), Registry.open(layers.layers[0][1]) as own:
        found = [each for each in found if not looked(own, here, each)]
    return sampled(found, seed)
