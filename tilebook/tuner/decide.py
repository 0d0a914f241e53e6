"""From the candidates that passed to a verdict: the finalists interleaved, the winner again in a fresh process."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tilebook.errors import OutOfTime, TuningError
from tilebook.registry import Again, Finalist, Json, Speedup, Verdict, VerdictStatus
from tilebook.registry.searched import DOUBT
from tilebook.tuner.budget import Turn
from tilebook.tuner.judge.measure import SAMPLE_MS
from tilebook.tuner.judge.stats import PROMOTION, Ratio, median, speedup
from tilebook.tuner.process.runner import Attempt, Candidate, Runner
from tilebook.tuner.tuning import Tuning

TIE = 1.003
"""Candidates within this factor of the fastest are equal: thirty interleaved rounds cannot tell them apart. The tie is
broken by what they cost, not by noise."""

ALIKE = 1.02
"""As far apart two runs may see what is equal: from process to process the ratio of two configs changes by 1 % and more
(20 runs of one problem on an H200), and stays so for as long as the process lives."""

NEAR = 1.15
"""Slower than our fastest by more than this after the second rung, and a candidate is no finalist."""

_FASTEST, _LIGHTEST = 5, 5  # finalists of each implementation that has a space
_TRIES = 3  # finalists that get the fresh process
_FEWEST = 3  # that a contest has, the default among them, however short the time


class DefaultFailed(TuningError):
    """The default config did not pass its last verification, so that there is nothing to compare with."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(f"the default config fails when confirmed: {attempt.failure}: {attempt.reason}")
        self.attempt = attempt


@dataclass(frozen=True)
class Contest:
    """Interleaved samples of candidates, ms; the default is the first, and the others' ratios are to it."""

    samples: Mapping[Candidate, Sequence[float]]
    seed: int

    def time_ms(self, candidate: Candidate) -> float:
        return median(self.samples[candidate])

    @functools.cached_property
    def ratios(self) -> dict[Candidate, Ratio]:
        baseline = next(iter(self.samples.values()))
        return {candidate: speedup(baseline, samples, self.seed) for candidate, samples in self.samples.items()}

    def tied(self, factor: float = TIE) -> list[Candidate]:
        """Those within this factor of the fastest, which comes first."""
        ranked = sorted(self.samples, key=lambda candidate: -self.ratios[candidate].value)
        fastest = self.ratios[ranked[0]].value
        return [candidate for candidate in ranked if self.ratios[candidate].value * factor >= fastest]


def confirm(tuning: Tuning, runner: Runner, rounds: int, seed: int, extra: Sequence[Candidate], turn: Turn) -> Verdict:
    """Interleaves the finalists with the default and every other implementation, and what wins with the default again
    in a fresh process. Promoted is the first in order of merit that beats the default beyond doubt both times.

    extra: candidates to be among the finalists however they did. turn: where time is short there are fewer finalists.
    Raises TuningError where the default fails, OutOfTime where a winner cannot be confirmed any more.
    """
    began = turn.now()
    tuning.phase("confirming")
    first = (_within if turn.limited else _qualify)(tuning, runner, rounds, seed, extra, turn)
    again: dict[Candidate, Contest] = {}
    chosen, ratio = tuning.default, Ratio(1.0, 1.0, 1.0)
    for candidate in _by_merit(tuning, first):
        if candidate == tuning.default or len(again) == _TRIES:
            break
        if first.ratios[candidate].low <= PROMOTION:
            continue
        fresh_s = turn.expected("each" if again else "fresh")
        if not (turn.affords(fresh_s) if again else turn.may_end(fresh_s)):
            if again:
                tuning.unconfirmed += 1
                break
            raise OutOfTime("the budget ended before its winner could be confirmed in a fresh process")
        tuning.phase("confirming in a fresh process")
        started = turn.now()
        repeat, _ = compete(tuning, runner, [tuning.default, candidate], rounds, seed + 1, fresh=not again)
        if not again:
            turn.note("fresh", turn.now() - started)
        again[candidate] = repeat
        if candidate in repeat.samples and repeat.ratios[candidate].low > PROMOTION:
            chosen, ratio = candidate, both(first.ratios[candidate], repeat.ratios[candidate])
            break
    tuning.state.confirming_s += turn.now() - began
    # What failed in the fresh process is out: to be served when the winner cannot be, least of all.
    first = Contest({c: samples for c, samples in first.samples.items() if c in tuning.times}, first.seed)
    status = VerdictStatus.DEFAULT if chosen == tuning.default else VerdictStatus.MEASURED
    ranked = [chosen, *(candidate for candidate in first.samples if candidate != chosen)]
    found = [finalist(tuning, candidate, first, again.get(candidate)) for candidate in ranked]
    notes: dict[str, Json] = {"tied": [_named(candidate) for candidate in _tie_set(tuning, first)]}
    return tuning.verdict(status, found, notes, first.time_ms(tuning.default), ratio)


def predict(tuning: Tuning) -> Verdict:
    """The config that the model ranks first; the default where the model sees no difference worth a change."""
    if not tuning.times:
        raise TuningError("no config of the space compiles for this GPU")
    ranked = sorted(tuning.times, key=lambda c: (tuning.times[c], tuning.burden(c)))
    chosen = ranked[0]
    if tuning.default in tuning.times and tuning.times[tuning.default] <= DOUBT * tuning.times[chosen]:
        chosen = tuning.default
    listed = [chosen, *(candidate for candidate in ranked[:_FASTEST] if candidate != chosen)]
    found = [
        Finalist(
            c.implementation,
            dict(c.config),
            predicted_ms=tuning.times[c],
            code=tuning.code(c),
            default=c == tuning.default,
        )
        for c in listed
    ]
    notes: dict[str, Json] = {"predicted_default_ms": tuning.times.get(tuning.default)}
    return tuning.verdict(VerdictStatus.PREDICTED, found, notes)


def finalists(tuning: Tuning) -> list[Candidate]:
    """The finalists of every implementation that was searched, ours first.

    However far ahead one is, the others' are ranked: it may not be there where the verdict is served.
    """
    return [candidate for entrant in tuning.entrants for candidate in _finalists(tuning, entrant.name)]


def _finalists(tuning: Tuning, implementation: str) -> list[Candidate]:
    """Its fastest, and the lightest of those that may tie with the fastest: among many equals a run would otherwise
    pick whichever its noise favours, another run another."""
    passed = [c for c in tuning.times if c.implementation == implementation]
    best = min((tuning.times[c] for c in passed), default=math.inf)
    ranked = sorted(set(passed) - {tuning.default}, key=lambda c: (tuning.times[c], tuning.burden(c)))
    near = [c for c in ranked if tuning.times[c] <= NEAR * best]
    equal = [c for c in near if tuning.times[c] <= ALIKE * best]
    return list(dict.fromkeys([*near[:_FASTEST], *sorted(equal, key=tuning.burden)[:_LIGHTEST]]))


def _qualify(tuning: Tuning, runner: Runner, rounds: int, seed: int, extra: Sequence[Candidate], turn: Turn) -> Contest:
    """The contest of all finalists. Where one fails its last verification the next moves up, and all run again."""
    while True:
        contest, failed = compete(tuning, runner, _wanted(tuning, extra), rounds, seed)
        if not failed:
            return contest


def _wanted(tuning: Tuning, extra: Sequence[Candidate]) -> list[Candidate]:
    """Who takes part: the default first, then the finalists, and every implementation that has no space."""
    if tuning.default not in tuning.times:
        raise TuningError("the default config did not pass: there is nothing to compare with")
    searched = {entrant.name for entrant in tuning.entrants}
    others = [c for c in tuning.times if c.implementation not in searched]
    wanted = [tuning.default, *finalists(tuning), *(c for c in extra if c in tuning.times), *others]
    return list(dict.fromkeys(wanted))


def _within(tuning: Tuning, runner: Runner, rounds: int, seed: int, extra: Sequence[Candidate], turn: Turn) -> Contest:
    """The contest of those finalists that there is time to verify, the fastest first, one by one.

    The default, the fastest of all, the fastest that has a space and what PyTorch's own function runs are among them,
    or it is no contest: a verdict serves in the place of that function.
    """
    default, *rest = _wanted(tuning, extra)
    tuned = {entrant.name for entrant in tuning.entrants}
    rest.sort(key=lambda c: (tuning.times[c], tuning.burden(c)))
    ahead = [c for c in rest if c.implementation in tuned][:1]
    native = [c for c in rest if tuning.native(c)][:1]
    musts = list(dict.fromkeys([*rest[:1], *ahead, *native]))
    fewest = max(_FEWEST, 1 + len(musts))
    wanted = [default, *dict.fromkeys([*musts, *rest])]
    passed: list[Candidate] = []
    for place, candidate in enumerate(wanted):
        part, lasting = "each" if passed else "first", [*passed, candidate]
        sampling_s = rounds * sum(max(SAMPLE_MS, tuning.times[c]) for c in lasting) / 1e3
        needed = turn.expected(part) + sampling_s + turn.expected("fresh")
        if place < fewest and not turn.may_end(needed):
            raise OutOfTime("the budget ended before its winner could be confirmed")
        if place >= fewest and not turn.affords(needed):
            tuning.unconfirmed = len(wanted) - place
            break
        began = turn.now()
        contest, _ = compete(tuning, runner, [candidate], 1, seed)
        turn.note(part, turn.now() - began)
        passed += contest.samples
    return compete(tuning, runner, passed, rounds, seed)[0]


def compete(
    tuning: Tuning, runner: Runner, candidates: Sequence[Candidate], rounds: int, seed: int, fresh: bool = False
) -> tuple[Contest, int]:
    """The contest of those that pass, and how many did not; these are dropped. Raises DefaultFailed."""
    attempts = runner.confirm(candidates, rounds, seed, fresh=fresh)
    passed, failed = {}, 0
    for candidate, attempt in zip(candidates, attempts, strict=True):
        if attempt.failure is None:
            passed[candidate] = attempt.samples_ms
        elif candidate == tuning.default:
            raise DefaultFailed(attempt)
        else:
            failed += 1
            tuning.drop(candidate, attempt)
    return Contest(passed, seed), failed


def _by_merit(tuning: Tuning, contest: Contest) -> list[Candidate]:
    """The tied ones, lightest first, then the rest by speed."""
    tied = sorted(contest.tied(), key=tuning.burden)
    return [*tied, *sorted(set(contest.samples) - set(tied), key=lambda c: (contest.time_ms(c), tuning.burden(c)))]


def _tie_set(tuning: Tuning, contest: Contest) -> list[Candidate]:
    """All that another run may find as good as the fastest: of the contest, and of those it had no room for."""
    tied = contest.tied(ALIKE)
    limit = ALIKE * tuning.times[tied[0]]
    return [*tied, *(c for c, ms in tuning.times.items() if c not in contest.samples and ms <= limit)]


def finalist(tuning: Tuning, candidate: Candidate, first: Contest, again: Contest | None) -> Finalist:
    """What the contests say of a candidate; `again` counts where it passed once more."""
    second = None
    if again is not None and candidate in again.samples:
        default, its = _rounded(again.samples[tuning.default]), _rounded(again.samples[candidate])
        second = Again(_speedup(again.ratios[candidate]), its, default)
    return Finalist(
        candidate.implementation,
        dict(candidate.config),
        time_ms=first.time_ms(candidate),
        speedup=_speedup(first.ratios[candidate]),
        samples_ms=_rounded(first.samples[candidate]),
        again=second,
        code=tuning.code(candidate),
        default=candidate == tuning.default,
    )


def _rounded(samples_ms: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(sample, 6) for sample in samples_ms)


def _speedup(ratio: Ratio) -> Speedup:
    return Speedup(ratio.value, ratio.low, ratio.high)


def both(one: Ratio, other: Ratio) -> Ratio:
    """What two runs say together: the middle, and an interval that covers both, processes' differences included."""
    return Ratio(math.sqrt(one.value * other.value), min(one.low, other.low), max(one.high, other.high))


def _named(candidate: Candidate) -> dict[str, Json]:
    return {"implementation": candidate.implementation, "config": dict(candidate.config)}
