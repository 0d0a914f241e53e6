"""Noise promotes nothing, and two tunes of one problem agree: over many runs against a GPU that is never quiet."""

import dataclasses
import hashlib
import itertools
import math
import random

import pytest
from fakes import FakeRunner, tune_in_memory
from toy import SPACE, make_op

from tilebook.op import Config, Op, Space
from tilebook.registry import VerdictStatus
from tilebook.tuner.process.runner import Candidate

DEFAULT = SPACE.default(None, None)


class NoisyRunner(FakeRunner):
    """Times as a shared machine gives them: noise of 0.3 to 1 % that differs between runs, now and then a sample that
    is up to twice too long, clocks that drift by several per cent, and another level in every process."""

    def __init__(self, time_ms, seed: int) -> None:
        super().__init__(time_ms, random.Random(seed).uniform(0.003, 0.01), seed)
        self._taken = 0
        self._drift = self._random.uniform(-0.02, 0.02)
        self._level = 1.0

    def _sample(self, candidate: Candidate) -> float:
        self._taken += 1
        value = super()._sample(candidate) * self._level
        if self._random.random() < 0.02:
            value *= self._random.uniform(1.05, 2.0)
        return value * (1 + self._drift * math.sin(self._taken / 400))

    def confirm(self, candidates, rounds, seed, *, fresh=False):
        """Interleaved, as the real one does it: a drift meets all candidates alike."""
        if fresh:
            self._level = self._random.uniform(0.97, 1.03)
        self.confirmed.append((tuple(candidates), fresh))
        series = [[0.0] * rounds for _ in candidates]
        for index in range(rounds):
            for place in self._random.sample(range(len(candidates)), len(candidates)):
                series[place][index] = self._sample(candidates[place])
        confirmed = [self._confirmed(candidate, rounds) for candidate in candidates]
        return [dataclasses.replace(c, samples_ms=tuple(s)) for c, s in zip(confirmed, series, strict=True)]


def with_space(space: Space) -> Op:
    op = make_op()
    op.implementations["triton"] = dataclasses.replace(op.implementations["triton"], space=space)
    return op


@pytest.mark.long
def test_the_same_config_twice_is_not_promoted_over_itself():
    """Two configs that take the same time. By their times in the search alone, half of the runs would promote."""
    twin = DEFAULT.replace(num_stages=2)
    op = with_space(
        Space(SPACE.axes, lambda p, c, d: None if c in (DEFAULT, twin) else "left out", lambda p, d: DEFAULT)
    )
    promoted = luckier = 0
    for seed in range(100):
        runner = NoisyRunner(lambda c: 1.0 if c.implementation == "triton" else 2.0, seed)
        verdict = tune_in_memory(op, runner, seed=seed)
        promoted += verdict.status is not VerdictStatus.DEFAULT
        first = {Config(each.config): each.time_ms for each in verdict.finalists if each.config}
        luckier += first[twin] < first[DEFAULT]
    assert promoted <= 1
    assert 20 <= luckier <= 80


def rough(candidate: Candidate) -> float:
    """A valley whose floor is full of configs within a per cent or two of one another."""
    if candidate.implementation == "torch":
        return 2.0
    config = candidate.config
    block, warps = config.number("BLOCK").bit_length() - 8, config.number("num_warps").bit_length() - 3
    steepness = max(0.0, abs(block) - 1) * 0.2 + max(0.0, abs(warps) - 1) * 0.15
    return 1.0 + steepness + 0.02 * int(hashlib.sha256(config.key.encode()).hexdigest()[:4], 16) / 0xFFFF


def named(verdict):
    return verdict.implementation, Config(verdict.config)


def ties(verdict):
    return {(each["implementation"], Config(each["config"])) for each in verdict.notes["tied"]}


@pytest.mark.long
def test_two_tunes_agree_on_the_winner_or_its_ties():
    verdicts = [tune_in_memory(make_op(), NoisyRunner(rough, seed), seed=seed) for seed in range(21)]
    agree = sum(
        named(one) == named(other) or named(one) in ties(other) or named(other) in ties(one)
        for one, other in itertools.pairwise(verdicts)
    )
    assert agree >= 19
    best = min(rough(Candidate("triton", config)) for config in SPACE.feasible(None, None))
    for verdict in verdicts:
        assert verdict.status is VerdictStatus.MEASURED
        assert rough(Candidate(*named(verdict))) <= 1.025 * best
        assert len(ties(verdict)) < 40  # a tie set that holds everything would agree with anything


def test_the_verdict_names_the_default_and_the_winner_as_they_were_in_both_runs():
    runner = NoisyRunner(rough, 3)
    verdict = tune_in_memory(make_op(), runner)
    (first, fresh), (again, fresh_again) = runner.confirmed
    assert (fresh, fresh_again) == (False, True)
    assert first[0] == again[0] == Candidate("triton", DEFAULT)
    assert named(verdict) == (again[1].implementation, again[1].config)
    assert [each for each in verdict.finalists if each.again is not None] == [verdict.winner]
    assert verdict.speedup_low == min(verdict.winner.speedup.low, verdict.winner.again.speedup.low) > 1.01
