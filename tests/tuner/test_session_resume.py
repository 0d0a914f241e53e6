"""What a run takes from the runs before it: verdicts, trials, and nothing that answers another question."""

import dataclasses
import signal

import pytest
from fakes import FakePool, FakeRunner, tune
from test_session import BEST, valley
from toy import SPACE, make_op

from tilebook.errors import TuningError
from tilebook.op import Config, Space
from tilebook.registry import Failure, Registry, VerdictStatus
from tilebook.tuner.known import Field, searched, unsearched
from tilebook.tuner.process.runner import Candidate


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


def op_with(axes=SPACE.axes, reject=SPACE.reject):
    """The toy op with another space; the kernel, and so its digest, is the same."""
    op = make_op()
    space = Space(axes, reject, SPACE.default)
    op.implementations["triton"] = dataclasses.replace(op.implementations["triton"], space=space)
    assert op.digest == make_op().digest
    return op


def ours(runner):
    return [c.config for c in runner.attempted if c.implementation == "triton"]


SMALL = op_with({**SPACE.axes, "BLOCK": (16, 32, 64)})


def test_a_space_that_grew_has_only_its_new_configs_measured_and_the_standing_winner_confirmed_with_them(path):
    first = FakeRunner(valley)
    tune(path, first, op=SMALL)
    with Registry.open(path) as registry:
        (small,) = registry.verdicts()
    second = FakeRunner(valley)
    states, registry = tune(path, second, op=make_op())
    assert not states[0].skipped
    assert ours(second)
    assert all(config["BLOCK"] > 64 for config in ours(second))
    assert states[0].reused == len(ours(first))
    assert Candidate("triton", Config(small.config)) in second.confirmed[0][0]
    assert Config(registry.verdicts()[0].config) == BEST
    third = FakeRunner(valley)
    states, _ = tune(path, third, op=make_op())
    assert states[0].skipped
    assert third.attempted == []


def test_an_axis_that_came_later_leaves_the_configs_from_before_it_what_they_are(path):
    first = FakeRunner(valley)
    tune(path, first, op=SMALL)
    grown = op_with(SMALL.tunable.space.axes)
    space = dataclasses.replace(
        grown.tunable.space, axes={**grown.tunable.space.axes, "CAP": (0, 64, 32)}, later={"CAP": 0}
    )
    grown.implementations["triton"] = dataclasses.replace(grown.tunable, space=space)
    second = FakeRunner(lambda candidate: valley(candidate) / (2 if candidate.config.get("CAP") == 32 else 1))
    states, registry = tune(path, second, op=grown)
    assert states[0].reused == len(ours(first))
    assert ours(second)
    assert all(config.get("CAP") in (64, 32) for config in ours(second))
    assert registry.verdicts()[0].config["CAP"] == 32


def test_a_config_that_a_rule_lets_in_again_is_new_too(path):
    strict = op_with(reject=lambda p, c, d: "not now" if c["num_stages"] == 3 else SPACE.reject(p, c, d))
    tune(path, FakeRunner(valley), op=strict)
    runner = FakeRunner(valley)
    _, registry = tune(path, runner, op=make_op())
    assert {config["num_stages"] for config in ours(runner)} == {3}
    assert Config(registry.verdicts()[0].config) == BEST


def test_the_standing_winner_stays_where_what_is_new_is_no_better(path):
    def slow_above_64(candidate):
        return 5.0 if candidate.config.get("BLOCK", 0) > 64 else valley(candidate)

    tune(path, FakeRunner(slow_above_64), op=SMALL)
    with Registry.open(path) as registry:
        (small,) = registry.verdicts()
    _, registry = tune(path, FakeRunner(slow_above_64), op=make_op())
    assert registry.verdicts()[0].config == small.config


def test_a_verdict_of_old_says_only_what_was_searched_of_our_kernel(path):
    tune(path, FakeRunner(valley), op=SMALL)
    with Registry.open(path, write=True) as registry:
        (verdict,) = registry.verdicts()
        notes = {name: value for name, value in verdict.notes.items() if name != "spaces"}
        notes["space"] = verdict.notes["spaces"]["triton"]
        registry.record((), dataclasses.replace(verdict, notes=notes, sources={}))
    assert tune(path, FakeRunner(valley), op=SMALL)[0][0].skipped
    runner = FakeRunner(valley)
    states, _ = tune(path, runner, op=make_op())
    assert not states[0].skipped
    assert all(config["BLOCK"] > 64 for config in ours(runner))


def test_a_verdict_that_does_not_say_what_was_searched_counts_as_complete(path):
    tune(path, FakeRunner(valley), op=SMALL)
    with Registry.open(path, write=True) as registry:
        (verdict,) = registry.verdicts()
        notes = {name: value for name, value in verdict.notes.items() if name != "spaces"}
        registry.record((), dataclasses.replace(verdict, notes=notes))
    states, _ = tune(path, FakeRunner(valley), op=make_op())
    assert states[0].skipped


@pytest.mark.parametrize("spaces", ["no", {"triton": 1}, {"triton": {"digest": "x", "axes": [], "feasible": "zz"}}])
def test_a_verdict_that_talks_nonsense_of_its_space_cannot_be_made(path, spaces):
    tune(path, FakeRunner(valley))
    with Registry.open(path) as registry:
        (verdict,) = registry.verdicts()
    with pytest.raises(ValueError, match="space"):
        dataclasses.replace(verdict, notes={**verdict.notes, "spaces": spaces})


def test_spaces_of_any_size_are_described_exactly_whatever_the_order_of_their_axes(path):
    large = Space({"b": tuple(range(300)), "a": tuple(range(200))}, lambda *_: None, lambda *_: Config(b=0, a=0))
    turned = Space(dict(reversed(large.axes.items())), large.reject, large.default)
    odd = [config for config in large.configs() if config["a"] % 2]
    tune(path, FakeRunner(valley), op=SMALL)
    with Registry.open(path, write=True) as registry:
        (verdict,) = registry.verdicts()
        notes = {**verdict.notes, "spaces": {"triton": searched(large, odd)}}
        registry.record((), dataclasses.replace(verdict, notes=notes))
        (stored,) = registry.verdicts()
    implementation = dataclasses.replace(SMALL.tunable, space=turned)
    assert unsearched(stored, Field(implementation, odd)) is None
    assert set(unsearched(stored, Field(implementation, list(turned.configs())))) == {
        c for c in large.configs() if not c["a"] % 2
    }


def test_a_prediction_over_a_smaller_space_is_made_anew_with_the_new_configs_alone(path):
    tune(path, None, op=SMALL)
    pool = FakePool()
    _, registry = tune(path, None, pool, op=make_op())
    assert pool.submitted
    assert all(config["BLOCK"] > 64 for config in pool.submitted)
    assert registry.verdicts()[0].status is VerdictStatus.PREDICTED


def test_trials_and_verdicts_of_the_other_mode_do_not_count_and_the_last_verdict_stands(path):
    tune(path, FakeRunner(valley))
    eager = FakeRunner(lambda c: valley(c) + (0.5 if c.config == BEST else 0))
    states, registry = tune(path, eager, mode="eager")
    assert (states[0].skipped, states[0].reused) == (False, 0)
    (verdict,) = registry.verdicts()
    assert verdict.mode == "eager"
    assert Config(verdict.config) != BEST
    assert {t.facts["mode"] for t in registry.trials()} == {"graph", "eager"}
    again = FakeRunner(valley)
    states, registry = tune(path, again, mode="graph")
    assert not states[0].skipped
    assert states[0].reused > 0
    assert Config(registry.verdicts()[0].config) == BEST


def test_a_resumed_run_has_the_counts_of_one_that_was_not_interrupted(path, tmp_path):
    class Ending(FakeRunner):
        def confirm(self, candidates, rounds, seed, *, fresh=False):
            raise TuningError("out of time")

    def risky(candidate):
        late = candidate.config.get("num_warps") == 16
        return Failure.WRONG_ANSWER if late else valley(candidate)

    tune(path, Ending(risky))
    resumed, registry = tune(path, FakeRunner(risky))
    whole, _ = tune(tmp_path / "other.db", FakeRunner(risky))
    assert resumed[0].rejected == whole[0].rejected
    assert resumed[0].tried == whole[0].tried
    assert registry.verdicts()[0].notes["reused"] == resumed[0].reused > 40


def test_ctrl_c_ends_the_run_at_once_and_keeps_its_trials(path):
    class Interrupted(FakeRunner):
        closed = False

        def attempt(self, candidate, most_ms):
            if len(self.attempted) == 10:
                signal.raise_signal(signal.SIGINT)
            return super().attempt(candidate, most_ms)

        def close(self):
            self.closed = True

    runner = Interrupted(valley)
    with pytest.raises(KeyboardInterrupt):
        tune(path, runner)
    assert runner.closed
    with Registry.open(path) as registry:
        kept = len(registry.trials())
        assert registry.verdicts() == []
    assert kept >= 9
    states, registry = tune(path, FakeRunner(valley))
    assert states[0].reused == kept - 1  # PyTorch's own choice is measured again
    assert Config(registry.verdicts()[0].config) == BEST


def test_what_a_program_has_observed_is_tuned_as_if_it_were_not_there(path):
    tune(path, FakeRunner(valley))
    with Registry.open(path, write=True) as registry:
        (measured,) = registry.verdicts()
        assert registry.merge((), [dataclasses.replace(measured, trusted=False)]).verdicts
        seen = dataclasses.replace(measured, origin="observed", notes={"observed": {"rounds": 8}})
        assert registry.merge((), [seen]).verdicts
    states, registry = tune(path, FakeRunner(valley))
    assert not states[0].skipped
    (found,) = registry.verdicts()
    assert (found.origin, found.notes.get("observed")) == ("local", None)
