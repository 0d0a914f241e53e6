"""One verdict on the GPU that is here: is its winner right, and as fast as what would run in its place?

The parts are the tuner's own: its verification, its timing, its interleaved contests. Nothing is stored before all is
decided, and then in one transaction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tilebook.device import Device
from tilebook.errors import TuningError, one_line
from tilebook.op import Config
from tilebook.registry import (
    Failure,
    Finalist,
    Json,
    Layers,
    Registry,
    Revocation,
    Speedup,
    Trial,
    Verdict,
    VerdictStatus,
)
from tilebook.registry.checks import text, version_range
from tilebook.registry.records import now
from tilebook.tuner import decide
from tilebook.tuner.audit.subjects import Finding, Outcome, Subject, candidate_of
from tilebook.tuner.decide import ALIKE, Contest
from tilebook.tuner.judge.stats import median, speedup
from tilebook.tuner.known import Known, source_of
from tilebook.tuner.process.runner import Attempt, Candidate, Runner
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.search import Search
from tilebook.tuner.tuning import Entrant, Tuning

FALL = 1.04
"""A first look whose times moved by less than this against the evidence saw nothing: fifteen samples of each of two
candidates, one after the other, agree to 1–2 %."""

BEATEN = 1.03
"""What is to take a winner's place is faster by more than this at the lower end of its interval. Two processes differ
by 1 % and more in the ratio of two candidates (see `ALIKE`), and what wins by that little is not worth a change."""

AHEAD = 1.05
"""A winner that is so far ahead of PyTorch's own call is worth serving, however much that has gained."""

RUNNERS_UP = 2
"""Of the verdict's other finalists that take part in a contest: what would serve in the winner's place."""

_WRONG = (Failure.WRONG_ANSWER, Failure.NOT_REPEATABLE)  # once is enough
_WORDS = 600  # characters of a reason
_ELSEWHERE = ("out of memory",)  # the words of failures that may be another program's fault


class Pending(Known):
    """As the registry is known, but trials that are recorded wait until they are taken, to be stored with what was
    decided by them."""

    def __init__(
        self, registry: Registry, layers: Layers, gpu: Device, environment: Mapping[str, str], mode: str
    ) -> None:
        super().__init__(registry, layers, gpu, environment, mode)
        self.trials_made: list[Trial] = []

    def record(self, trials: Iterable[Trial] = (), verdict: Verdict | None = None) -> None:
        del verdict
        self.trials_made += trials

    def take(self) -> list[Trial]:
        made, self.trials_made = self.trials_made, []
        return made


@dataclass(frozen=True)
class Decided:
    """A finding and what is to be stored of it."""

    finding: Finding
    trials: Sequence[Trial] = ()
    verdict: Verdict | None = None
    revocation: Revocation | None = None


class _Broken(Exception):
    """The winner fails here; the text is the class of its failure and what was said."""


@dataclass
class Check:
    """The look at one subject. by: the command's name, for what is stored.

    drift: how many times as long as by the evidence it took what was timed before, winners and rivals alike: what the
    GPU's clock does to both is nobody's regression.
    """

    subject: Subject
    known: Pending
    gpu: Device
    runner: Runner
    rounds: int
    seed: int
    by: str
    drift: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        op, problem = self.subject.op, self.subject.problem
        ours = op.tunable
        assert ours.space is not None
        # Nobody has promised that the first config of somebody else's list is right, or fits: a tune has found one.
        found = [self._candidate(each) for each in self.subject.verdict.finalists if each.default and op.answers]
        listed = itertools.chain((c.config for c in found if c), ours.space.defaults(problem, self.gpu))
        default = next((c for c in listed if not self.known.revoked(ours, c)), None)
        if default is None:
            raise TuningError("every config of our kernel is revoked: there is nothing to compare with")
        entrant = Entrant(ours, [default], default, Search(ours.space, [default], [default], "grid"))
        state = ProblemState(op.name, problem.label, 1, 0, 1)
        self._tuning = Tuning(op, problem, self.gpu, [entrant], self.known, state, Run(1, True))
        self._attempts: dict[Candidate, Attempt] = {}
        self.winner = self.subject.winner
        self._plain = [Candidate("torch")] if "torch" in op.implementations else []
        self.rival = next((c for c in [*self._plain, self._tuning.default] if c != self.winner), self.winner)

    def whole(self) -> Decided:
        """Verified as a candidate and as a finalist, and timed interleaved with what would run in its place."""
        return self._look(quick=False)

    def quick(self) -> Decided:
        """Verified as a candidate, timed beside its rival, and no more where that is as it was."""
        return self._look(quick=True)

    def _look(self, quick: bool) -> Decided:
        self.known.take()
        self.runner.prepare(self.subject.op, self.subject.problem)
        try:
            if self.rival != self.winner and not self._passes(self.rival):
                raise TuningError(f"{self.rival}, which it is compared with, fails here: {self._said(self.rival)}")
            self._sound()
            if not quick:
                return self._contend()
            if self._suspicious():
                return self._rematch()
            return self._decided(Outcome.KEPT, ratio=self._time(self.rival) / self._time(self.winner))
        except _Broken as broken:
            return self._quarantine(str(broken))

    def _passes(self, candidate: Candidate) -> bool:
        """Verifies and times a candidate, as a tune does; what came of it is kept."""
        if candidate not in self._attempts:
            self._attempts[candidate] = attempt = self.runner.attempt(candidate, None)
            self._tuning.record(candidate, attempt, {"by": self.by})
        return self._attempts[candidate].failure is None

    def _sound(self) -> None:
        """Raises _Broken where the winner fails: at once where it is wrong, else where it does so twice."""
        if self._passes(self.winner):
            return
        if self._attempts[self.winner].failure not in _WRONG:
            self._attempts.pop(self.winner)
            if self._passes(self.winner):
                return
        self._accuse()

    def _accuse(self) -> None:
        said = self._said(self.winner)
        if self.winner.implementation == "torch" or self._attempts[self.winner].failure is Failure.UNAVAILABLE:
            raise TuningError(said)
        if any(words in said for words in _ELSEWHERE):
            raise TuningError(said)
        raise _Broken(said)

    def _said(self, candidate: Candidate) -> str:
        attempt = self._attempts[candidate]
        said = one_line(f"{str(attempt.failure).replace('_', ' ')}: {attempt.reason}")[:_WORDS]
        return text(said, "reason")  # what a process printed goes to terminals

    def _time(self, candidate: Candidate) -> float:
        time_ms = self._attempts[candidate].time_ms
        if not time_ms:
            raise TuningError(f"{candidate} has no time")
        return time_ms

    def _before(self) -> float | None:
        """How many times as fast as its rival the winner was, by the verdict's evidence."""
        verdict = self.subject.verdict
        named = [(each, self._candidate(each)) for each in verdict.finalists]
        theirs = next((each.time_ms for each, c in named if c == self.rival), None)
        return theirs / verdict.time_ms if theirs and verdict.time_ms else None

    def _suspicious(self) -> bool:
        """Did the winner become slower than the GPU did, or fall behind its rival?"""
        its, theirs = self._time(self.winner), self._time(self.rival)
        was, before = self.subject.verdict.time_ms, self._before()
        if before is None or not was:
            return theirs < AHEAD * its
        self.drift += its / was, theirs / (before * was)
        usual = median([*self.drift, 1.0])
        return its > FALL * usual * was or (theirs < AHEAD * its and theirs * FALL < before * its)

    def _rematch(self) -> Decided:
        """The winner against what could serve in its place: beside it, then interleaved in a fresh process."""
        default = self._tuning.default
        others = [c for c in dict.fromkeys([default, *self._plain, *self._runners_up()]) if c != self.winner]
        best = min((c for c in others if self._passes(c)), key=self._time, default=self.winner)
        lead = self._time(self.rival) / self._time(self.winner)
        if self._time(self.winner) <= ALIKE * self._time(best):
            return self._decided(Outcome.KEPT, ratio=lead)
        contest = self._compete([default, self.winner, self.rival, best], fresh=True)
        if best in contest.samples and self._beaten(contest, best):
            return self._renewed(Outcome.DEMOTED, contest, None, best)
        return self._decided(Outcome.KEPT, ratio=lead)

    def _contend(self) -> Decided:
        """All that could serve, interleaved; what beats the winner must do so again in a fresh process."""
        default = self._tuning.default
        listed = [default, self.winner, *self._plain, *self._runners_up()]
        first = self._compete([c for c in listed if self._passes(c)])
        others = (c for c in first.samples if c != self.winner)
        best = max(others, key=lambda c: first.ratios[c].value, default=self.winner)
        if best == self.winner or not self._beaten(first, best):
            return self._renewed(Outcome.KEPT, first, None, self.winner)
        again = self._compete([default, self.winner, best], fresh=True)
        first = Contest({c: s for c, s in first.samples.items() if c in self._tuning.times}, first.seed)
        if best in again.samples and self._beaten(again, best):
            return self._renewed(Outcome.DEMOTED, first, again, best)
        return self._renewed(Outcome.KEPT, first, again, self.winner)

    def _runners_up(self) -> list[Candidate]:
        found = [self._candidate(each) for each in self.subject.verdict.finalists[1:]]
        rest = [c for c in found if c is not None and c not in (self.rival, self._tuning.default)]
        return rest[:RUNNERS_UP]

    def _candidate(self, each: Finalist) -> Candidate | None:
        op = self.subject.op
        found = candidate_of(op, self.subject.problem, self.gpu, each.implementation, each.config)
        if found is None or self.known.revoked(op.implementations[found.implementation], found.config):
            return None
        return found

    def _compete(self, candidates: Iterable[Candidate], fresh: bool = False) -> Contest:
        """Raises _Broken where the winner fails its last verification."""
        if not self._passes(self._tuning.default):
            raise TuningError(f"the default config fails here: {self._said(self._tuning.default)}")
        taking = list(dict.fromkeys(candidates))
        try:
            contest, _ = decide.compete(self._tuning, self.runner, taking, self.rounds, self.seed + fresh, fresh=fresh)
        except decide.DefaultFailed as failed:
            if self.winner != self._tuning.default:
                raise
            self._attempts[self.winner] = failed.attempt
            self._accuse()
            raise
        if self.rival not in contest.samples and self.rival in taking:
            raise TuningError(f"{self.rival}, which it is compared with, fails when it is confirmed")
        if self.winner not in contest.samples:
            named = self.winner.implementation, dict(self.winner.config)
            last = next(t for t in reversed(self.known.trials_made) if (t.implementation, t.config) == named)
            self._attempts[self.winner] = Attempt(last.failure, last.reason)
            self._accuse()
        return contest

    def _beaten(self, contest: Contest, best: Candidate) -> bool:
        return speedup(contest.samples[self.winner], contest.samples[best], self.seed).low > BEATEN

    def _renewed(self, outcome: Outcome, first: Contest, again: Contest | None, chosen: Candidate) -> Decided:
        """The verdict by what was measured here and now, `chosen` its winner."""
        verdict, tuning = self.subject.verdict, self._tuning
        ratio = first.ratios[chosen]
        if again is not None and chosen in again.samples:
            ratio = decide.both(ratio, again.ratios[chosen])
        ranked = [chosen, *(c for c in first.samples if c != chosen)]
        measured = [self._coded(decide.finalist(tuning, c, first, again if c == chosen else None)) for c in ranked]
        default = chosen == tuning.default
        lead = speedup(first.samples[self.rival], first.samples[self.winner], self.seed)
        reason = "" if outcome is Outcome.KEPT else self._slower(first, chosen)
        made = replace(
            verdict,
            environment=self.known.environment,
            status=VerdictStatus.DEFAULT if default else VerdictStatus.MEASURED,
            finalists=(*measured, *self._unmeasured(first)),
            default_time_ms=first.time_ms(tuning.default),
            interval=Speedup(1.0, 1.0, 1.0) if default else Speedup(ratio.value, ratio.low, ratio.high),
            mode=self.known.mode,
            sources={**(verdict.sources if verdict.trusted else {}), **self._sources(first)},
            notes=self._notes(outcome, reason),
            origin="local",
            trusted=True,
            created_at=now(),
        )
        return self._decided(outcome, reason, made, ratio=lead.value)

    def _slower(self, contest: Contest, chosen: Candidate) -> str:
        its, others = contest.time_ms(self.winner), contest.time_ms(chosen)
        return f"{self.winner} takes {its:.4g} ms here, {chosen} {others:.4g} ms"

    def _coded(self, made: Finalist) -> Finalist:
        """Under the same Triton the same source is the same code, which is not compiled for its digest here."""
        was, here = self.subject.verdict, self.known.environment.versions.get("triton")
        if not was.trusted or was.environment.versions.get("triton") != here:
            return made
        return replace(made, code=next((each.code for each in was.finalists if each.key == made.key), ""))

    def _unmeasured(self, contest: Contest) -> list[Finalist]:
        """A trusted verdict's other finalists, to fall back on, without times: they did not run in this environment."""
        if not self.subject.verdict.trusted:
            return []
        kept = []
        for each in self.subject.verdict.finalists:
            candidate = self._candidate(each)
            if candidate is not None and candidate not in contest.samples and candidate not in self._failed():
                kept.append(Finalist(each.implementation, each.config))
        return kept

    def _failed(self) -> set[Candidate]:
        lost = {c for c, attempt in self._attempts.items() if attempt.failure is not None}
        return lost | (self._attempts.keys() - self._tuning.times.keys())

    def _sources(self, contest: Contest) -> dict[str, str]:
        tried = {c.implementation for c in contest.samples} | {self.subject.op.tunable.name}
        found = (self.subject.op.implementations[name] for name in tried)
        return {each.name: source_of(each) for each in found if each.space is not None}

    def _notes(self, outcome: Outcome, reason: str) -> dict[str, Json]:
        """A stranger's account of the search is not taken over; what was demoted is to be searched again."""
        was = self.subject.verdict
        told: dict[str, Json] = {
            "by": self.by,
            "outcome": outcome.value,
            "reason": reason,
            "origin": was.origin,
            "created_at": was.created_at.isoformat(),
            "environment": dict(was.environment.versions),
            "winner": str(self.winner),
            "made": was.notes.get("made"),
        }
        notes: dict[str, Json] = {**(was.notes if was.trusted else {}), "checked": told, "made": self.known.made}
        notes.pop("observed", None)  # it is measured now
        if outcome is Outcome.DEMOTED:
            notes["searches"] = {self.subject.op.tunable.name: {"asked": 0, "ended": "budget"}}
        return notes

    def _quarantine(self, said: str) -> Decided:
        """The winner may not run any more: what fails on one problem is not to be trusted on another."""
        implementation = self.subject.op.implementations[self.winner.implementation]
        label = f"{self.subject.problem.label} {getattr(self.subject.problem, 'dtype', '')}".strip()
        revocation = Revocation(
            op=self.subject.op.name,
            implementation=implementation.name,
            reason=f"{said} ({self.by}, {label})",
            kernel=implementation.digest or None,
            arch=self.known.device.arch,
            triton=_exactly(self.known.environment.versions.get("triton", "")) if implementation.digest else None,
            config=dict(self.winner.config),
            made=self.known.made,
        )
        return self._decided(Outcome.QUARANTINED, said, revocation=revocation)

    def _decided(
        self,
        outcome: Outcome,
        reason: str = "",
        verdict: Verdict | None = None,
        revocation: Revocation | None = None,
        ratio: float | None = None,
    ) -> Decided:
        served = self.winner if outcome is Outcome.KEPT else None
        if outcome is Outcome.DEMOTED and verdict is not None:
            served = Candidate(verdict.implementation, Config(verdict.config))
        finding = Finding(
            self.subject,
            outcome,
            reason,
            "" if served is None else str(served),
            self.rival.implementation,
            ratio,
            self._before(),
        )
        return Decided(finding, self.known.take(), verdict, revocation)


def _exactly(version: str) -> str | None:
    """The range that only this release is in; None where the version is none."""
    try:
        return version_range(f"=={version.split('+')[0]}", "triton")
    except ValueError:
        return None
