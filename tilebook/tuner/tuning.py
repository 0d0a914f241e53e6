"""One problem while it is tuned: what is known of its candidates, and how that is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tilebook.device import Device
from tilebook.op import Config, Implementation, Op, Problem, Space
from tilebook.registry import Failure, Finalist, Json, Speedup, Status, Trial, Verdict, VerdictStatus
from tilebook.tuner.judge.stats import Ratio
from tilebook.tuner.known import PREDICTED, Known, searched, source_of, trial_kernel
from tilebook.tuner.process.compile import Compiled
from tilebook.tuner.process.runner import Attempt, Candidate
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.search import Search


@dataclass
class Entrant:
    """A tunable implementation of one problem's op: what of its space may run here, and its search.

    default: the first of its configs to be tried. twins: machine code → the config that stands for all that compile
    to it.
    """

    implementation: Implementation
    feasible: Sequence[Config]
    default: Config
    search: Search
    twins: dict[str, Config] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.implementation.name

    @property
    def space(self) -> Space:
        space = self.implementation.space
        assert space is not None
        return space

    def candidate(self, config: Config) -> Candidate:
        return Candidate(self.name, config)


Ending = Literal["converged", "all", "trials", "budget"]
"""What ended a search: no more gain, no more configs, --trials, or the budget."""


@dataclass(frozen=True)
class Searched:
    """How far a search has come: candidates asked for, in this run and those before it, and what ended it."""

    asked: int
    ended: Ending


@dataclass
class Tuning:
    """The candidates of one problem on one GPU. times: ms of those that passed, measured or predicted.

    entrants: our own kernel first, whose default is what the others' times are compared with. searches: by
    implementation. unmeasured, unconfirmed: implementations without a space, and finalists, that there was no time for.
    """

    op: Op[Any]
    problem: Problem
    gpu: Device
    entrants: Sequence[Entrant]
    known: Known
    state: ProblemState
    run: Run
    times: dict[Candidate, float] = field(default_factory=dict)
    compiled: dict[Candidate, Compiled] = field(default_factory=dict)
    searches: dict[str, Searched] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)
    unconfirmed: int = 0

    def native(self, candidate: Candidate) -> bool:
        """Is it what a function of PyTorch's own runs for this problem, in whose place the verdict will serve?"""
        name = candidate.implementation
        own = self.op.fused(self.problem) and self.op.native(name, self.problem, self.gpu)
        return own or name in self.op.pytorchs[1:]

    @property
    def default(self) -> Candidate:
        ours = self.entrants[0]
        return ours.candidate(ours.default)

    def phase(self, name: str) -> None:
        self.state.phase = name
        self.run.changed()

    def reuse(self, entrant: Entrant, config: Config, trial: Trial) -> float | None:
        """Takes over what a run before this one found; returns the config's time where it has one."""
        self.state.reused += 1
        compiled, candidate = trial.facts.get("compiled"), entrant.candidate(config)
        if isinstance(compiled, dict):
            self.compiled[candidate] = Compiled.from_json(compiled)
            twin = entrant.twins.setdefault(self.compiled[candidate].fingerprint, config)
            if trial.failure is Failure.DUPLICATE_BINARY:
                self.state.rejected[trial.failure] += 1
                return self.times.get(entrant.candidate(twin))
        if trial.failure is not None:
            self.state.rejected[trial.failure] += 1
            return trial.time_ms if trial.failure is Failure.SLOW else None
        self.state.passed += 1
        score = trial.facts.get("predicted_ms", trial.time_ms)
        if isinstance(score, float):
            self.note(candidate, score)
            return score
        return None

    def note(self, candidate: Candidate, time_ms: float) -> None:
        """Remembers the time of a candidate that passed, for the finals and the view."""
        self.times[candidate] = time_ms
        if candidate == self.default:
            self.state.default_ms = time_ms
        if self.state.best_ms is None or time_ms < self.state.best_ms:
            self.state.best_ms, self.state.best = time_ms, str(candidate)

    def record(self, candidate: Candidate, attempt: Attempt, facts: Mapping[str, Json], ran: bool = True) -> None:
        """Counts and stores what came of a candidate. `ran`: on the GPU; else a rule turned it away before."""
        if attempt.failure is None:
            status = Status.OK
            self.state.passed += 1
            if attempt.time_ms is not None:
                self.state.timed += 1
                self.note(candidate, attempt.time_ms)
        else:
            status = Status.FAILED if ran and attempt.failure is not Failure.SLOW else Status.REJECTED
            self.state.rejected[attempt.failure] += 1
        trial = Trial(
            op=self.op.name,
            problem=self.problem.key,
            device=self.known.device,
            environment=self.known.environment,
            kernel=trial_kernel(self.op.implementations[candidate.implementation]),
            implementation=candidate.implementation,
            config=dict(candidate.config),
            status=status,
            failure=attempt.failure,
            reason=attempt.reason,
            time_ms=attempt.time_ms,
            samples_ms=attempt.samples_ms,
            facts={"mode": self.known.mode, "made": self.known.made, **facts, **attempt.facts},
        )
        self.known.record([trial])
        self.run.changed()

    def drop(self, candidate: Candidate, attempt: Attempt) -> None:
        """A candidate that had passed fails: its time counts no longer, and its failure is stored."""
        del self.times[candidate]
        self.state.passed -= 1
        compiled = self.compiled.get(candidate)
        self.record(candidate, attempt, {"compiled": compiled.to_json()} if compiled and compiled.binaries else {})

    def burden(self, candidate: Candidate) -> tuple[Any, ...]:
        """What breaks a tie: our own kernels first, then fewest spills, least shared memory, fewest warps, the text."""
        compiled = self.compiled.get(candidate)
        binaries = compiled.binaries if compiled else ()
        return (
            candidate.implementation != self.op.tunable.name,
            not self.op.implementations[candidate.implementation].digest,
            sum(b.spills for b in binaries),
            sum(b.shared for b in binaries),
            sum(b.warps for b in binaries),
            candidate.implementation,
            candidate.config.key,
        )

    def code(self, candidate: Candidate) -> str:
        """The digest of a candidate's machine code; empty where it is not ours."""
        compiled = self.compiled.get(candidate)
        ours = self.op.implementations[candidate.implementation].digest
        return compiled.fingerprint if compiled is not None and ours else ""

    def verdict(
        self,
        status: VerdictStatus,
        finalists: Sequence[Finalist],
        notes: Mapping[str, Json],
        default_ms: float | None = None,
        ratio: Ratio | None = None,
    ) -> Verdict:
        """finalists: the winner first. ratio: the winner's against the default."""
        return Verdict(
            op=self.op.name,
            problem=self.problem.key,
            device=self.known.device,
            environment=self.known.environment,
            kernel=self.op.digest,
            status=status,
            finalists=tuple(finalists),
            default_time_ms=default_ms,
            interval=None if ratio is None else Speedup(ratio.value, ratio.low, ratio.high),
            mode="graph" if self.known.mode == PREDICTED else self.known.mode,
            sources={each.name: source_of(each.implementation) for each in self.entrants},
            notes={**self._found(), "made": self.known.made, **notes},
        )

    def _found(self) -> dict[str, Json]:
        """How the verdict was found: where, among how many, in what time."""
        state = self.state
        return {
            "spaces": {each.name: searched(each.space, each.feasible) for each in self.entrants},
            "searches": {name: {"asked": each.asked, "ended": each.ended} for name, each in self.searches.items()},
            "unmeasured": list(self.unmeasured),
            "unconfirmed": self.unconfirmed,
            "tried": state.tried,
            "reused": state.reused,
            "rejected": {failure.value: n for failure, n in sorted(state.rejected.items())},
            "infeasible": state.infeasible,
            "revoked": state.revoked,
            "seconds": {
                "total": round(state.elapsed_s, 3),
                "compiling": round(state.compiling_s, 3),
                "measuring": round(state.measuring_s, 3),
                "waiting": round(state.waiting_s, 3),
                "confirming": round(state.confirming_s, 3),
            },
            "busy": None if state.busy is None else round(state.busy, 3),
        }
