"""Tunes one problem after the other: enumerate → compile → verify → time → confirm → store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from tilebook import registry as store
from tilebook.device import Device
from tilebook.op import Config, Cost, Op, Problem
from tilebook.registry import Failure, Json, Layers, Registry, Status, Trial, Verdict, VerdictStatus
from tilebook.tuner.compile import Compiled, CompilePool
from tilebook.tuner.model import predict
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.search import Search
from tilebook.tuner.stats import Ratio, median, speedup
from tilebook.tuner.worker import Attempt, Candidate, Runner

PROMOTION = 1.01
"""A winner must beat the default by this factor at the lower end of its interval, or the default stays."""

TIE = 1.01
"""Candidates within this factor of the fastest are equal; the tie is broken by what they cost, not by noise."""

DOUBT = 1.2
"""A prediction replaces the default where the model promises more than this. Over 78 problems measured on an H200 that
took 1.18–1.20 times as long as the best for attention; the model's first choice 1.19–1.37, the default 1.20–1.43."""

_FINALISTS = 4
_BATCH = 16
_GAIN = 0.99  # a batch that does not lower the best time below this share of it has gained nothing
_PATIENCE = 3
_SEEDS_FROM_NEIGHBOURS = 4


@dataclass(frozen=True)
class Options:
    """How long and how to search. `trials` limits the candidates of one problem; None means all that are worth it."""

    trials: int | None = None
    seed: int = 0
    method: str = "tpe"
    rounds: int = 30
    force: bool = False


@dataclass
class _Tuning:
    """The state of one problem while it is tuned."""

    op: Op[Any]
    problem: Problem
    default: Config
    search: Search
    state: ProblemState
    times: dict[Candidate, float] = field(default_factory=dict)
    compiled: dict[Config, Compiled] = field(default_factory=dict)
    twins: dict[str, Config] = field(default_factory=dict)  # machine code → the config that was measured with it


class Session:
    """Tunes problems for one GPU model into one registry. Without a runner it predicts instead of measuring."""

    def __init__(
        self,
        gpu: Device,
        environment: Mapping[str, str],
        registry: Registry,
        layers: Layers,
        pool: CompilePool,
        runner: Runner | None,
        options: Options,
        run: Run,
    ) -> None:
        self.gpu = gpu
        self.device = store.Device(gpu.name, gpu.arch, gpu.sm_count)
        self.environment = store.Environment(dict(environment))
        self._registry, self._layers, self._pool, self._runner = registry, layers, pool, runner
        self._options, self._run = options, run

    def tune_all(self, problems: Sequence[tuple[Op[Any], Problem]]) -> list[ProblemState]:
        """Tunes each problem, sharing the run's time that is left evenly among the problems that are left."""
        for index, (op, problem) in enumerate(problems):
            now = time.monotonic()
            left = None if self._run.deadline is None else max(0.0, self._run.deadline - now)
            self._tune(op, problem, None if left is None else now + left / (len(problems) - index))
        return self._run.done

    def _tune(self, op: Op[Any], problem: Problem, deadline: float | None) -> None:
        space = op.tunable.space
        assert space is not None
        feasible = space.feasible(problem, self.gpu)
        default = space.default(problem, self.gpu)
        limit = min(len(feasible), self._options.trials or len(feasible))
        state = ProblemState(op.name, problem.label, len(feasible), len(space) - len(feasible), limit)
        self._run.begin(state)
        try:
            standing = self._standing(op, problem, feasible)
            if standing is not None and not self._options.force:
                state.verdict, state.skipped = standing, True
                return
            seeds = [default, *self._seeds(op, problem)]
            method = self._options.method if self._runner is not None else "grid"
            ordered = self._by_roofline(op, problem, feasible)
            search = Search(space, ordered, seeds, method, self._options.seed)
            tuning = _Tuning(op, problem, default, search, state)
            self._reuse(tuning, feasible)
            if self._runner is None:
                self._explore(tuning, limit, deadline)
                state.verdict = self._predict(tuning)
            else:
                self._runner.prepare(op, problem)
                self._measure_others(tuning)
                self._explore(tuning, limit, deadline)
                self._polish(tuning, deadline)
                state.verdict = self._confirm(tuning)
            self._registry.record((), state.verdict)
        except RuntimeError as broken:
            state.error = str(broken)
        finally:
            self._run.end()

    # What is known already

    def _standing(self, op: Op[Any], problem: Problem, feasible: Sequence[Config]) -> Verdict | None:
        """A verdict that makes this problem's tuning superfluous: same kernel and, where measured, same environment."""
        found = self._registry.verdicts(op=op.name, problem=problem.key, device=self.device, kernel=op.digest)
        for verdict in found:
            if not verdict.trusted:
                continue  # somebody else's word
            if verdict.implementation == op.tunable.name and Config(verdict.config) not in feasible:
                continue  # the space has changed its mind since
            if verdict.measured:
                return verdict if verdict.environment == self.environment or self._runner is None else None
            if self._runner is None and verdict.environment == self.environment:
                return verdict
        return None

    def _seeds(self, op: Op[Any], problem: Problem) -> Iterable[Config]:
        """Winners of the nearest problems on this GPU first, then on GPUs of the same architecture."""
        ranked = []
        for _, verdict in self._layers.verdicts(op=op.name):
            same = verdict.device == self.device
            if verdict.device.arch != self.device.arch:
                continue
            try:
                distance = problem.distance(op.problem.from_key(verdict.problem))
            except (TypeError, ValueError):
                continue
            space = op.tunable.space
            ours = [
                Config(c) for name, c in verdict.ranking() if name == op.tunable.name and space and space.contains(c)
            ]
            if ours and distance < float("inf"):
                ranked.append((not same, distance, ours[0]))
        ranked.sort(key=lambda each: each[:2])
        return [config for _, _, config in ranked[:_SEEDS_FROM_NEIGHBOURS]]

    def _by_roofline(self, op: Op[Any], problem: Problem, feasible: Sequence[Config]) -> list[Config]:
        """The configs in the order a grid should try them: least padded work first."""
        work = op.tunable.space.work if op.tunable.space else None
        if work is None:
            return list(feasible)

        def floor_s(cost: Cost) -> float:
            return cost.flops / self.gpu.flops + cost.bytes / (4 * self.gpu.bandwidth)

        return sorted(feasible, key=lambda config: floor_s(work(problem, config)))

    def _reuse(self, tuning: _Tuning, feasible: Sequence[Config]) -> None:
        """Takes over the trials of a run that was cut short: same kernel, same environment."""
        if self._options.force:
            return
        known = frozenset(feasible)
        wanted = {
            "op": tuning.op.name,
            "problem": tuning.problem.key,
            "device": self.device,
            "kernel": tuning.op.digest,
        }
        for trial in self._registry.trials(origin="local", **wanted):  # type: ignore[arg-type]
            config = Config(trial.config)
            usable = trial.implementation == tuning.op.tunable.name and trial.environment == self.environment
            if not usable or config not in known or ("predicted_ms" in trial.facts) != (self._runner is None):
                continue
            tuning.state.reused += 1
            compiled = trial.facts.get("compiled")
            if isinstance(compiled, dict):
                tuning.compiled[config] = Compiled.from_json(compiled)
                tuning.twins.setdefault(tuning.compiled[config].fingerprint, config)
            score = trial.facts["predicted_ms"] if self._runner is None else trial.time_ms
            if trial.status is Status.OK and isinstance(score, float):
                tuning.search.tell(config, score)
                self._note(tuning, Candidate(trial.implementation, config), score)
            else:
                tuning.search.tell(config, None)

    # Exploring

    def _explore(self, tuning: _Tuning, limit: int, deadline: float | None) -> None:
        """Asks, compiles, measures and tells until the limit, the deadline, or three batches without a gain."""
        asked, since_gain, best = tuning.state.reused, 0, float("inf")
        waiting: dict[Future[Compiled], Config] = {}
        width = 2 * self._pool.workers
        measured = self._runner is not None
        while True:
            late = deadline is not None and time.monotonic() > deadline and tuning.search.told(tuning.default)
            stale = measured and since_gain >= _PATIENCE * _BATCH
            if not late and not stale and asked < limit:
                for config in tuning.search.ask(min(width - len(waiting), limit - asked)):
                    waiting[self._submit(tuning, config)] = config
                    asked += 1
            if not waiting or late:
                break
            for config, compiled in self._finished(tuning, waiting):
                self._judge(tuning, config, compiled)
                since_gain += 1
                if tuning.search.best is not None and tuning.search.best[1] < _GAIN * best:
                    best, since_gain = tuning.search.best[1], 0
        for future in waiting:
            future.cancel()

    def _polish(self, tuning: _Tuning, deadline: float | None) -> None:
        """Tries every config one step from the best, until none of them is better."""
        centre: Config | None = None
        while tuning.search.best is not None and tuning.search.best[0] != centre:
            if deadline is not None and time.monotonic() > deadline:
                return
            centre = tuning.search.best[0]
            waiting = {self._submit(tuning, config): config for config in tuning.search.polish(centre)}
            tuning.state.limit = max(tuning.state.limit, tuning.state.tried + len(waiting))
            while waiting:
                for config, compiled in self._finished(tuning, waiting):
                    self._judge(tuning, config, compiled)

    def _submit(self, tuning: _Tuning, config: Config) -> Future[Compiled]:
        return self._pool.submit(tuning.op.name, tuning.op.tunable.name, tuning.problem.key, config)

    def _finished(self, tuning: _Tuning, waiting: dict[Future[Compiled], Config]) -> Iterable[tuple[Config, Compiled]]:
        """The compilations that are done, at least one; the time spent waiting for it is counted."""
        start = time.monotonic()
        done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        tuning.state.waiting_s += time.monotonic() - start
        if not done:
            self._run.changed()
        # In the order of asking, so that a run with the same seed takes the same steps wherever it can.
        return [(waiting.pop(future), future.result()) for future in list(waiting) if future in done]

    def _judge(self, tuning: _Tuning, config: Config, compiled: Compiled) -> None:
        """Decides over one compiled candidate, and stores the trial."""
        state, candidate = tuning.state, Candidate(tuning.op.tunable.name, config)
        state.compiled += 1
        state.compiling_s += compiled.seconds
        facts: dict[str, Json] = {"compiled": compiled.to_json()}
        if compiled.failure is not None:
            attempt = Attempt(Failure(compiled.failure), compiled.reason)
        elif (twin := tuning.twins.setdefault(compiled.fingerprint, config)) != config:
            twin_ms = tuning.times.get(Candidate(candidate.implementation, twin))
            attempt = Attempt(Failure.DUPLICATE_BINARY, f"the same machine code as {twin}")
            tuning.search.tell(config, twin_ms)
            self._record(tuning, candidate, attempt, facts, tell=False)
            return
        elif self._runner is None:
            tuning.compiled[config] = compiled
            work = tuning.op.tunable.space.work if tuning.op.tunable.space else None
            cost = work(tuning.problem, config) if work else None
            prediction = predict(tuning.problem.cost(), cost, compiled, self.gpu)
            facts |= {"predicted_ms": prediction.time_ms, "bound": prediction.bound, "occupancy": prediction.occupancy}
            tuning.search.tell(config, prediction.time_ms)
            self._note(tuning, candidate, prediction.time_ms)
            self._record(tuning, candidate, Attempt(), facts, tell=False)
            return
        else:
            tuning.compiled[config] = compiled
            best = tuning.search.best
            start = time.monotonic()
            attempt = self._runner.attempt(candidate, None if config == tuning.default or best is None else best[1])
            state.measuring_s += time.monotonic() - start
        self._record(tuning, candidate, attempt, facts)

    def _measure_others(self, tuning: _Tuning) -> None:
        """Verifies and times every implementation that has no space: PyTorch's own choice, cuDNN …"""
        assert self._runner is not None
        for name, implementation in tuning.op.implementations.items():
            if implementation.space is None and implementation.can_run(tuning.problem, self.gpu):
                start = time.monotonic()
                attempt = self._runner.attempt(Candidate(name), None)
                tuning.state.measuring_s += time.monotonic() - start
                self._record(tuning, Candidate(name), attempt, {}, tell=False)

    def _record(
        self, tuning: _Tuning, candidate: Candidate, attempt: Attempt, facts: Mapping[str, Json], tell: bool = True
    ) -> None:
        state = tuning.state
        if attempt.failure is None:
            status = Status.OK
            state.passed += 1
            state.verified += attempt.time_ms is not None
            if attempt.time_ms is not None:
                state.timed += 1
                self._note(tuning, candidate, attempt.time_ms)
        else:
            compile_only = candidate.config not in tuning.compiled and tell
            status = Status.REJECTED if compile_only or attempt.failure is Failure.SLOW else Status.FAILED
            status = Status.REJECTED if attempt.failure is Failure.DUPLICATE_BINARY else status
            state.rejected[attempt.failure] += 1
        if tell:
            tuning.search.tell(candidate.config, attempt.time_ms)
        trial = Trial(
            op=tuning.op.name,
            problem=tuning.problem.key,
            device=self.device,
            environment=self.environment,
            kernel=tuning.op.digest,
            implementation=candidate.implementation,
            config=dict(candidate.config),
            status=status,
            failure=attempt.failure,
            reason=attempt.reason,
            time_ms=attempt.time_ms,
            samples_ms=attempt.samples_ms,
            facts={**facts, **attempt.facts},
        )
        self._registry.record([trial])
        self._run.changed()

    def _note(self, tuning: _Tuning, candidate: Candidate, time_ms: float) -> None:
        """Remembers the time of a candidate that passed, for the finals and the view."""
        tuning.times[candidate] = time_ms
        state = tuning.state
        if candidate == Candidate(tuning.op.tunable.name, tuning.default):
            state.default_ms = time_ms
        if state.best_ms is None or time_ms < state.best_ms:
            state.best_ms, state.best = time_ms, str(candidate)

    # Deciding

    def _confirm(self, tuning: _Tuning) -> Verdict:
        """Interleaves the finalists with the default; promotes only what beats it beyond doubt."""
        assert self._runner is not None
        ours = tuning.op.tunable.name
        default = Candidate(ours, tuning.default)
        if default not in tuning.times:
            raise RuntimeError("the default config did not pass: there is nothing to compare with")
        ranked = sorted(tuning.times, key=lambda c: tuning.times[c])
        finalists = [c for c in ranked if c.implementation == ours and c != default][:_FINALISTS]
        others = [c for c in ranked if c.implementation != ours]
        field_ = [default, *finalists, *others]
        start = time.monotonic()
        series = self._runner.confirm(field_, self._options.rounds, self._options.seed)
        tuning.state.measuring_s += time.monotonic() - start
        ratios = {c: speedup(series[0], s, self._options.seed) for c, s in zip(field_, series, strict=True)}
        times = {c: median(s) for c, s in zip(field_, series, strict=True)}
        fastest = max(ratios[c].value for c in field_)
        tied = [c for c in field_ if ratios[c].value * TIE >= fastest]
        winner = min(tied, key=lambda c: self._burden(tuning, c))
        promoted = winner != default and ratios[winner].low > PROMOTION
        chosen = winner if promoted else default
        evidence: dict[str, Json] = {
            **self._counts(tuning),
            "candidates": [
                {
                    "implementation": c.implementation,
                    "config": dict(c.config),
                    "time_ms": times[c],
                    "speedup": [ratios[c].value, ratios[c].low, ratios[c].high],
                    "samples_ms": [round(sample, 6) for sample in s],
                }
                for c, s in zip(field_, series, strict=True)
            ],
        }
        ratio = ratios[chosen] if promoted else Ratio(1.0, 1.0, 1.0)
        status = VerdictStatus.MEASURED if promoted else VerdictStatus.DEFAULT
        return self._verdict(tuning, status, chosen, evidence, times[chosen], times[default], ratio)

    def _burden(self, tuning: _Tuning, candidate: Candidate) -> tuple[Any, ...]:
        """What breaks a tie: our own kernels first, then fewest spills, least shared memory, fewest warps, the text."""
        compiled = tuning.compiled.get(candidate.config)
        binaries = compiled.binaries if compiled else ()
        return (
            candidate.implementation != tuning.op.tunable.name,
            sum(b.spills for b in binaries),
            sum(b.shared for b in binaries),
            sum(b.warps for b in binaries),
            candidate.config.key,
        )

    def _predict(self, tuning: _Tuning) -> Verdict:
        """The config that the model ranks first; the default where the model sees no difference worth a change."""
        default = Candidate(tuning.op.tunable.name, tuning.default)
        if not tuning.times:
            raise RuntimeError("no config of the space compiles for this GPU")
        ranked = sorted(tuning.times, key=lambda c: (tuning.times[c], self._burden(tuning, c)))
        chosen = ranked[0]
        if default in tuning.times and tuning.times[default] <= DOUBT * tuning.times[chosen]:
            chosen = default
        evidence: dict[str, Json] = {
            **self._counts(tuning),
            "predicted_ms": tuning.times[chosen],
            "predicted_default_ms": tuning.times.get(default),
            "candidates": [
                {"implementation": c.implementation, "config": dict(c.config), "predicted_ms": tuning.times[c]}
                for c in ranked[:_FINALISTS]
            ],
        }
        return self._verdict(tuning, VerdictStatus.PREDICTED, chosen, evidence)

    def _counts(self, tuning: _Tuning) -> dict[str, Json]:
        state = tuning.state
        return {
            "tried": state.tried,
            "rejected": {failure.value: n for failure, n in sorted(state.rejected.items())},
            "infeasible": state.infeasible,
            "seconds": {
                "total": round(state.elapsed_s, 3),
                "compiling": round(state.compiling_s, 3),
                "measuring": round(state.measuring_s, 3),
                "waiting": round(state.waiting_s, 3),
            },
        }

    def _verdict(
        self,
        tuning: _Tuning,
        status: VerdictStatus,
        chosen: Candidate,
        evidence: Mapping[str, Json],
        time_ms: float | None = None,
        default_ms: float | None = None,
        ratio: Ratio | None = None,
    ) -> Verdict:
        return Verdict(
            op=tuning.op.name,
            problem=tuning.problem.key,
            device=self.device,
            environment=self.environment,
            kernel=tuning.op.digest,
            status=status,
            implementation=chosen.implementation,
            config=dict(chosen.config),
            time_ms=time_ms,
            default_time_ms=default_ms,
            speedup=ratio.value if ratio else None,
            speedup_low=ratio.low if ratio else None,
            speedup_high=ratio.high if ratio else None,
            evidence=evidence,
        )
