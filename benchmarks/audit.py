"""Does `tilebook audit` find what an upgrade made slow or wrong, at what cost, and does it leave the rest alone?

    python benchmarks/audit.py --seeds 100 --out benchmarks/results/cpu/audit.json

Needs no GPU. Verdicts are those of whole tunes over recorded sweeps, each also with two, four … times as much of the
same work. Then the software changes: the GPU is up to 5 % faster or slower, each candidate up to about 1 % for itself,
by another 1 % in each process, and regressions are planted:

    slow       the winner takes 1.08 to 2 times as long
    wrong      the winner's config gives wrong answers or kills its process, wherever it is a verdict's winner
    yardstick  PyTorch's own call of an op is faster than the winner, by as much
    kernel     configs of one kernel that have one value of one axis are slower, or an implementation as a whole

What counts is not what was planted but what came of it. A verdict has *regressed* where its winner is wrong, or takes
at least 1.05 times as long as the best that could serve in its place: another finalist, the default, PyTorch's own.
Demoted wrongly is one whose winner is within 1.02 of that; what lies between is counted by itself. The cost is the
simulated time of the audit over that of the tunes, in which both pay for what sweeps do not record as `Costed` says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilebook import op as ops
from tilebook.op import Config
from tilebook.registry import Failure, Layers, Verdict
from tilebook.tuner.audit.run import Auditor
from tilebook.tuner.audit.subjects import AUDIT, Finding, Outcome, candidate_of, subjects
from tilebook.tuner.budget import Budget
from tilebook.tuner.known import Known
from tilebook.tuner.process.runner import Attempt, Candidate
from tilebook.tuner.progress import Run
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import tune_all
from tilebook.tuner.sweeps.machines import Costed, bench_of, unhindered
from tilebook.tuner.sweeps.recorded import COUNTS, Lane, recorded_op, todays_default
from tilebook.tuner.sweeps.sweep import Measured, Sweep, read

SWEEPS = Path(__file__).parent / "results" / "nvidia-h200" / "sweeps"
RESULTS = Path(__file__).parent / "results" / "cpu" / "audit.json"
LATER = {"triton": "3.8.0", "torch": "2.13.0+cu130"}
"""What is other in the environment after the upgrade."""

REGRESSED, EQUAL = 1.05, 1.02
FACTORS = (1.08, 2.0)
GPU, OWN = 0.05, 0.005  # the GPU's change at most; the deviation of each candidate's
PROCESS = 0.007  # the deviation of what a candidate takes from one process to another: ratios of two differ by 1 %
SHARE = 0.1  # of the verdicts that get a regression of their own
SHARED = 0.3  # the chance of each kind that many share
VARIANTS = (1, 2, 4, 8, 16)
SHARES = (-1.0, 0.15, 0.3, 1.0)
BUDGETS = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Tuned:
    """A verdict with the recorded candidates that matter to it, and the simulated seconds that its tune took."""

    sweep: Sweep
    verdict: Verdict
    seconds: float
    default: Candidate


def tuned(sweep: Sweep, variants: Sequence[int] = VARIANTS, options: Options = Options()) -> list[Tuned]:  # noqa: B008
    """Tunes a sweep's problem, and says the same of variants of it that do the same work more often."""
    op, machine, run = recorded_op(sweep), Costed(sweep), Run(1, True)
    problem = op.problem.from_key(sweep.header["problem"])
    with tempfile.TemporaryDirectory() as folder:
        layers = Layers([("explicit", str(Path(folder) / "registry.db"))])
        with layers.writer() as registry:
            known = Known(registry, layers, sweep.device, sweep.header["environment"], "graph")
            session = Session(sweep.device, known, machine, machine, options, run, lane=Lane(machine))
            (state,) = tune_all([session], [(op, problem)], run)
    assert state.verdict is not None, state.error
    default = Candidate(sweep.implementation, Config(sweep.header["default"]))
    return [each for times in variants for each in _variant(sweep, state.verdict, machine.now, default, times)]


def _variant(sweep: Sweep, verdict: Verdict, seconds: float, default: Candidate, times: int) -> Iterator[Tuned]:
    real = unhindered(ops.get(verdict.op))
    problem = real.problem.from_key(verdict.problem)
    more = next(name for name in COUNTS if hasattr(problem, name))
    varied = replace(problem, **{more: times * getattr(problem, more)})
    today = todays_default(replace(sweep, header={**sweep.header, "problem": varied.key}))
    taking = [candidate_of(real, varied, sweep.device, f.implementation, f.config) for f in verdict.finalists]
    measured = {each.candidate: each for each in sweep.measured}
    default = Candidate(default.implementation, today) if today is not None else default
    if None in taking or default not in measured or measured[default].attempt.failure is not None:
        return
    kept = tuple(measured[c] for c in dict.fromkeys([*taking, default, Candidate("torch")]) if c is not None)
    small = Sweep({**sweep.header, "problem": varied.key, "label": varied.label}, kept)
    yield Tuned(
        small, replace(verdict, problem=varied.key, kernel=real.digest, sources=_sources(verdict)), seconds, default
    )


def _sources(verdict: Verdict) -> dict[str, str]:
    found = ops.get(verdict.op).implementations
    return {name: found[name].digest or source for name, source in verdict.sources.items() if name in found}


class Upgrade:
    """What changes for each candidate: a factor of its time, or a failure."""

    def __init__(self, verdicts: Sequence[Tuned], seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.gpu = math.exp(draw.uniform(-GPU, GPU))
        own = draw.sample(range(len(verdicts)), max(1, round(SHARE * len(verdicts))))
        self.own = {place: draw.choice(("slow", "slow", "wrong")) for place in own}
        broken = [verdicts[place].verdict for place, kind in self.own.items() if kind == "wrong"]
        self.wrong = {(v.op, v.implementation, Config(v.config)) for v in broken if v.implementation == "triton"}
        names = sorted({each.verdict.op for each in verdicts})
        self.yardstick = draw.choice(names) if draw.random() < SHARED else None
        self.kernel = self._kernel(verdicts) if draw.random() < SHARED else None

    def factor(self) -> float:
        low, high = map(math.log, FACTORS)
        return math.exp(self.draw.uniform(low, high))

    def _kernel(self, verdicts: Sequence[Tuned]) -> tuple[str, str, tuple[str, Any] | None, float]:
        """An op's implementation, an axis with a value, and a factor."""
        one = self.draw.choice(verdicts).verdict
        axis = self.draw.choice(sorted(one.config.items(), key=str)) if one.config else None
        return one.op, one.implementation, axis, self.factor()

    def after(self, place: int, tuned: Tuned) -> tuple[Sweep, set[str]]:
        """The sweep as it would be measured now, and the kinds of regressions planted in it."""
        verdict, planted = tuned.verdict, set[str]()
        winner = Candidate(verdict.implementation, Config(verdict.config))
        factors = {m.candidate: self.gpu * self.draw.lognormvariate(0, OWN) for m in tuned.sweep.measured}
        failure = None
        if self.own.get(place) == "slow" and winner.implementation != "torch":
            factors[winner] *= self.factor()
            planted.add("slow")
        if (verdict.op, winner.implementation, winner.config) in self.wrong:
            failure = self.draw.choice((Failure.WRONG_ANSWER, Failure.WORKER_DIED))
            planted.add("wrong")
        torch = next(m.attempt.time_ms for m in tuned.sweep.measured if m.candidate.implementation == "torch")
        if self.yardstick == verdict.op and winner.implementation != "torch" and torch and verdict.time_ms:
            factors[Candidate("torch")] *= verdict.time_ms / torch / self.factor()
            planted.add("yardstick")
        if self.kernel is not None and self.kernel[:2] == (verdict.op, verdict.implementation):
            _, name, axis, factor = self.kernel
            slowed = [c for c in factors if c.implementation == name and (axis is None or axis in c.config.items())]
            if name != "torch":
                factors.update({c: factors[c] * factor for c in slowed})
                planted |= {"kernel"} if winner in slowed else set()
        measured = tuple(
            _after(m, factors[m.candidate], failure if m.candidate == winner else None) for m in tuned.sweep.measured
        )
        environment = {**tuned.sweep.header["environment"], **LATER}
        return Sweep({**tuned.sweep.header, "environment": environment}, measured), planted


def _after(measured: Measured, factor: float, failure: Failure | None) -> Measured:
    attempt = measured.attempt
    if failure is not None:
        return replace(measured, attempt=Attempt(failure, "planted"))
    if attempt.time_ms is None:
        return measured
    samples = tuple(factor * sample for sample in attempt.samples_ms)
    return replace(measured, attempt=replace(attempt, time_ms=factor * attempt.time_ms, samples_ms=samples))


class Noisy:
    """The runner in front of it, as unsure as a GPU's: what a candidate takes differs from process to process."""

    def __init__(self, runner: Any, seed: int) -> None:
        self._runner, self._draw = runner, random.Random(seed)
        self._factors: dict[Candidate, float] = {}

    def prepare(self, op: Any, problem: Any) -> None:
        self._factors.clear()
        self._runner.prepare(op, problem)

    def attempt(self, candidate: Candidate, most_ms: float | None) -> Attempt:
        return self._seen(candidate, self._runner.attempt(candidate, most_ms))

    def confirm(self, candidates: Sequence[Candidate], rounds: int, seed: int, *, fresh: bool = False) -> list[Attempt]:
        if fresh:
            self._factors.clear()
        found = self._runner.confirm(candidates, rounds, seed, fresh=fresh)
        return [self._seen(candidate, attempt) for candidate, attempt in zip(candidates, found, strict=True)]

    def _seen(self, candidate: Candidate, attempt: Attempt) -> Attempt:
        if attempt.failure is not None or attempt.time_ms is None:
            return attempt
        factor = self._factors.setdefault(candidate, self._draw.lognormvariate(0, PROCESS))
        samples = tuple(factor * sample for sample in attempt.samples_ms)
        return replace(attempt, time_ms=factor * attempt.time_ms, samples_ms=samples)

    def close(self) -> None: ...


def behind(sweep: Sweep, verdict: Verdict) -> float:
    """How many times as long the winner takes as the best that could serve in its place; infinite where it fails."""
    winner = Candidate(verdict.implementation, Config(verdict.config))
    times = {m.candidate: m.attempt.time_ms for m in sweep.measured if m.attempt.failure is None and m.attempt.time_ms}
    if winner not in times:
        return math.inf
    return times[winner] / min((ms for candidate, ms in times.items() if candidate != winner), default=math.inf)


def judge(verdicts: Sequence[Tuned], seed: int, share: float | None = None) -> dict[str, Any]:
    """One upgrade, audited: what was found, missed and demoted wrongly, and what it cost.

    share: of the tunes' time that the audit may take; None without a limit.
    """
    upgrade, again_s = Upgrade(verdicts, seed), sum(each.seconds for each in verdicts)
    after = [upgrade.after(place, each) for place, each in enumerate(verdicts)]
    here, machines = bench_of([sweep for sweep, _ in after])
    noisy = Noisy(machines, seed)
    here = replace(here, runner=lambda mode: noisy)
    with tempfile.TemporaryDirectory() as folder:
        layers = Layers([("explicit", str(Path(folder) / "registry.db"))])
        with layers.writer() as registry:
            registry.merge(verdicts=[each.verdict for each in verdicts])
            budget = Budget(None if share is None else share * again_s, clock=here.clock)
            auditor = Auditor(here, layers, registry, budget, seed)
            findings = list(auditor.audit(subjects(layers, here, AUDIT)))
    truth = {
        (e.verdict.op, e.verdict.problem): (behind(s, e.verdict), kinds)
        for e, (s, kinds) in zip(verdicts, after, strict=True)
    }
    return {"seed": seed, **counted(findings, truth), "cost": round(machines.now / again_s, 4)}


def counted(findings: Sequence[Finding], truth: Mapping[tuple[str, str], tuple[float, set[str]]]) -> dict[str, Any]:
    gone = (Outcome.DEMOTED, Outcome.QUARANTINED)
    sorts, missed = Counter[str](), list[dict[str, Any]]()
    kinds, weights = Counter[str](), dict.fromkeys(("all", "found"), 0.0)
    for each in findings:
        ratio, planted = truth[each.subject.verdict.op, each.subject.verdict.problem]
        demoted = each.outcome in gone
        sort = "regressed" if ratio >= REGRESSED else "equal" if ratio <= EQUAL else "between"
        sorts[sort] += 1
        sorts[f"{sort} demoted"] += demoted
        sorts["looked at"] += each.outcome is not Outcome.NOT_REACHED
        weights["all"] += each.subject.weight * (sort == "regressed")
        weights["found"] += each.subject.weight * (sort == "regressed" and demoted)
        if sort == "regressed":
            kinds.update(planted)
            if not demoted:
                missed.append(
                    {
                        "op": each.subject.op.name,
                        "behind": round(ratio, 3),
                        "outcome": each.outcome,
                        "planted": sorted(planted),
                    }
                )
    return {
        "verdicts": len(findings),
        "looked_at": sorts["looked at"],
        "regressed": sorts["regressed"],
        "found": sorts["regressed demoted"],
        "missed": missed,
        "weight": weights["all"],
        "found_weight": weights["found"],
        "equal": sorts["equal"],
        "false": sorts["equal demoted"],
        "between": sorts["between"],
        "between_demoted": sorts["between demoted"],
        "planted": dict(kinds),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    regressed, found = sum(run["regressed"] for run in runs), sum(run["found"] for run in runs)
    costs = [run["cost"] for run in runs]
    return {
        "runs": len(runs),
        "verdicts": sum(run["verdicts"] for run in runs),
        "looked_at": sum(run["looked_at"] for run in runs),
        "regressed": regressed,
        "found": found,
        "found_share": round(found / regressed, 4) if regressed else None,
        "missed": regressed - found,
        "found_share_by_use": round(sum(run["found_weight"] for run in runs) / sum(run["weight"] for run in runs), 4),
        "equal": sum(run["equal"] for run in runs),
        "false": sum(run["false"] for run in runs),
        "between": sum(run["between"] for run in runs),
        "between_demoted": sum(run["between_demoted"] for run in runs),
        "planted": dict(sum((Counter(run["planted"]) for run in runs), Counter[str]())),
        "cost": {"median": statistics.median(costs), "mean": round(statistics.mean(costs), 4), "most": max(costs)},
        "cost_where_at_most": _by_share(runs),
    }


def _by_share(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean cost of the upgrades that made at most so much of the verdicts regress, and of the others."""
    found: dict[str, Any] = {}
    for low, high in itertools.pairwise(SHARES):
        costs = [run["cost"] for run in runs if low < run["regressed"] / run["verdicts"] <= high]
        mean = round(statistics.mean(costs), 4) if costs else None
        found[f"{high:.0%} regressed"] = {"runs": len(costs), "mean": mean, "most": max(costs, default=None)}
    return found


def reached(result: Mapping[str, Any]) -> bool:
    """95 % of what has regressed found in a fifth of the time, and nothing else demoted?"""
    whole = result["unlimited"]
    return whole["found_share"] >= 0.95 and whole["cost"]["mean"] <= 0.2 and not whole["false"]


def every_sweep() -> list[Sweep]:
    """One for each problem."""
    found = [read(path) for path in sorted(SWEEPS.glob("*.jsonl"))]
    return list({(each.header["op"], each.header["problem"]): each for each in found}.values())


def document(verdicts: Sequence[Tuned], seeds: int) -> dict[str, Any]:
    runs = [judge(verdicts, seed) for seed in range(seeds)]
    limited = {
        f"{share:.0%}": summary([judge(verdicts, seed, share) for seed in range(seeds // 2)]) for share in BUDGETS
    }
    return {
        "tuning_s": round(sum(each.seconds for each in verdicts), 1),
        "verdicts": len(verdicts),
        "regressed_from": REGRESSED,
        "equal_to": EQUAL,
        "unlimited": summary(runs),
        "with_a_budget_of": limited,
        "seeds": runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    verdicts = [each for sweep in every_sweep() for each in tuned(sweep)]
    result = document(verdicts, options.seeds)
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("verdicts", "unlimited", "with_a_budget_of")}, indent=1))
    return 0 if reached(result) else 1


if __name__ == "__main__":
    raise SystemExit(main())
