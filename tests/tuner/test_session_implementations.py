"""An op with several implementations that have a space: each is searched, in its own space, and any may win."""

import dataclasses

import pytest
import torch
from fakes import Clock, FakePool, FakeRunner, TimedRunner, tune
from test_session import BEST, valley
from toy import SPACE, Scaling, make_op

from tilebook.errors import TuningError
from tilebook.op import Config, Space, powers_of_two
from tilebook.registry import Failure, Registry, Revocation, VerdictStatus
from tilebook.tuner import known
from tilebook.tuner.budget import Budget
from tilebook.tuner.process.runner import Candidate
from tilebook.tuner.progress import Run

AXES = {"TILE": powers_of_two(1, 128), "num_warps": (1, 2, 4)}
FIRST = Config(TILE=1, num_warps=1)
FASTEST = Config(TILE=8, num_warps=2)


def _other(x: torch.Tensor, *, config: Config) -> torch.Tensor:
    return x * 3


def _rewritten(x: torch.Tensor, *, config: Config) -> torch.Tensor:
    return 3 * x


def two(function=_other, axes=AXES, **how):
    """The toy op with a second implementation that has a space."""
    op = make_op()
    op.implementation("other", space=Space(axes, lambda *_: None, lambda *_: FIRST), **how)(function)
    return op


def times(candidate: Candidate) -> float:
    """The other's first config takes 1.6 ms and its best 0.5 ms, half of what our own kernel's best does."""
    if candidate.implementation != "other":
        return valley(candidate)
    tile = candidate.config.number("TILE").bit_length() - 4
    return 0.5 + 0.1 * tile**2 + 0.2 * (candidate.config["num_warps"] != 2)


def configs(runner, implementation="other"):
    return [c.config for c in runner.attempted if c.implementation == implementation]


class NotingPool(FakePool):
    """Notes whose configs it compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = []

    def submit(self, op, implementation, problem, config):
        self.asked.append(implementation)
        return super().submit(op, implementation, problem, config)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "registry.db"


def stored(path):
    with Registry.open(path) as registry:
        (verdict,) = registry.verdicts()
        return verdict


def test_the_second_is_searched_in_its_own_space_and_can_win(path):
    pool, runner = NotingPool(), FakeRunner(times)
    states, registry = tune(path, runner, pool, op=two())
    (verdict,) = registry.verdicts()
    assert (verdict.implementation, Config(verdict.config)) == ("other", FASTEST)
    assert verdict.status is VerdictStatus.MEASURED
    assert verdict.speedup == pytest.approx(valley(Candidate("triton", SPACE.default(None, None))) / 0.5, rel=0.02)
    assert set(pool.asked) == {"triton", "other"}
    assert configs(runner)[0] == FIRST
    assert BEST in configs(runner, "triton")
    assert states[0].feasible == len(SPACE.feasible(Scaling(64, 64), None)) + 24
    assert states[0].compiled == len(pool.asked)
    assert states[0].tried == len(registry.trials())


def test_finalists_of_each_are_confirmed_together_with_the_default_of_our_kernel_first(path):
    runner = FakeRunner(times)
    _, registry = tune(path, runner, op=two())
    together, _ = runner.confirmed[0]
    assert together[0] == Candidate("triton", SPACE.default(None, None))
    assert {Candidate("triton", BEST), Candidate("other", FASTEST), Candidate("torch")} < set(together)
    ranking = registry.verdicts()[0].ranking()
    assert next(Config(config) for name, config in ranking if name == "triton") == BEST


def test_a_second_whose_configs_all_fail_leaves_the_first_its_verdict(path):
    runner = FakeRunner(lambda c: Failure.WRONG_ANSWER if c.implementation == "other" else valley(c))
    states, registry = tune(path, runner, op=two())
    (verdict,) = registry.verdicts()
    assert states[0].error == ""
    assert (verdict.implementation, Config(verdict.config)) == ("triton", BEST)
    assert states[0].rejected[Failure.WRONG_ANSWER] == len(configs(runner)) == 24


def test_a_second_that_cannot_run_the_problem_is_not_searched(path):
    pool = NotingPool()
    _, registry = tune(path, FakeRunner(times), pool, op=two(supports=lambda problem: False))
    assert set(pool.asked) == {"triton"}
    assert list(registry.verdicts()[0].notes["spaces"]) == ["triton"]


def test_to_predict_only_our_own_kernel_is_compiled_and_ranked(path):
    pool = NotingPool()
    _, registry = tune(path, None, pool, op=two())
    assert set(pool.asked) == {"triton"}
    assert registry.verdicts()[0].implementation == "triton"


def test_trials_limit_each_and_each_has_its_share_of_the_time(path, tmp_path):
    runner = FakeRunner(lambda c: 1.0, noise=0.0)
    tune(path, runner, op=two(), trials=6)
    assert all(6 <= len(configs(runner, name)) <= 6 + 6 for name in ("triton", "other"))
    clock = Clock()
    late = TimedRunner(clock, times, attempt=1.0)
    tune(tmp_path / "late.db", late, op=two(), run=Run(1, True, Budget(20.0, clock=clock)))
    assert configs(late)[0] == FIRST
    assert SPACE.default(None, None) in configs(late, "triton")
    assert len(late.attempted) < 20


def test_the_next_one_s_first_candidates_compile_before_the_first_one_s_are_all_measured(path):
    runner, measured = FakeRunner(times), []

    class Watching(NotingPool):
        def submit(self, op, implementation, problem, config):
            if implementation == "triton":
                measured.append(len(configs(runner, "other")))
            return super().submit(op, implementation, problem, config)

    tune(path, runner, Watching(), op=two())
    assert 0 < measured[0] < len(configs(runner, "other"))


@pytest.mark.parametrize(("how", "order"), [({}, ["other", "triton"]), ({"external": "numpy"}, ["triton", "other"])])
def test_small_spaces_come_first_what_compiles_on_the_gpu_s_time_and_what_has_no_space_last(path, how, order):
    op, runner = two(**how), FakeRunner(lambda c: 1.5 if c.implementation == "theirs" else times(c))
    op.implementation("theirs")(lambda x: x * 3)
    tune(path, runner, op=op)
    began = dict.fromkeys(candidate.implementation for candidate in runner.attempted)
    assert list(began) == ["torch", *order, "theirs"]


def test_one_that_is_new_is_all_that_is_searched_for_a_problem_that_has_a_verdict(path):
    tune(path, FakeRunner(valley))
    before = stored(path)
    runner = FakeRunner(times)
    states, registry = tune(path, runner, op=two())
    assert configs(runner, "triton") == []
    assert Candidate("triton", BEST) in runner.confirmed[0][0]
    (verdict,) = registry.verdicts()
    assert verdict.implementation == "other"
    assert verdict.notes["spaces"]["triton"] == before.notes["spaces"]["triton"]
    assert verdict.kernel == before.kernel
    again = FakeRunner(times)
    states, _ = tune(path, again, op=two())
    assert (states[0].skipped, again.attempted) == (True, [])


def test_where_its_space_grew_only_its_new_configs_are_measured(path):
    tune(path, FakeRunner(times), op=two(axes={**AXES, "TILE": (1, 2, 4)}))
    runner = FakeRunner(times)
    _, registry = tune(path, runner, op=two())
    assert configs(runner, "triton") == []
    assert configs(runner)
    assert all(config["TILE"] > 4 for config in configs(runner))
    assert Config(registry.verdicts()[0].config) == FASTEST


def test_where_its_source_changed_all_of_it_is_measured_anew_and_nothing_of_ours(path):
    tune(path, FakeRunner(times), op=two())
    before, runner = stored(path), FakeRunner(times)
    changed = two(_rewritten)
    _, registry = tune(path, runner, op=changed)
    assert configs(runner, "triton") == []
    assert FASTEST in configs(runner)
    (verdict,) = registry.verdicts()
    assert verdict.kernel == before.kernel == changed.digest
    assert verdict.source_of("other") == changed.implementations["other"].digest != before.source_of("other")
    assert tune(path, FakeRunner(times), op=changed)[0][0].skipped


def test_an_interrupted_run_resumes_each(path):
    class Ending(FakeRunner):
        def confirm(self, candidates, rounds, seed, *, fresh=False):
            raise TuningError("out of time")

    first, second = Ending(times), FakeRunner(times)
    tune(path, first, op=two())
    states, registry = tune(path, second, op=two())
    assert configs(second) == configs(second, "triton") == []
    assert states[0].reused == len(configs(first)) + len(configs(first, "triton"))
    assert Config(registry.verdicts()[0].config) == FASTEST


def test_the_best_of_each_on_the_nearest_problem_is_tried_right_after_its_first(path):
    tune(path, FakeRunner(times), op=two(), problems=[Scaling(64, 64)])
    runner = FakeRunner(times)
    tune(path, runner, op=two(), problems=[Scaling(128, 64)])
    assert configs(runner)[1] == FASTEST
    assert configs(runner, "triton")[1] == BEST


def test_identical_machine_code_of_two_implementations_is_measured_for_both(path):
    runner = FakeRunner(times)
    tune(path, runner, FakePool(code=lambda c: "the same"), op=two())
    assert len(configs(runner)) == len(configs(runner, "triton")) == 1


def test_an_external_one_is_not_compiled_ahead_and_its_version_is_what_its_trials_depend_on(path, monkeypatch):
    installed = {"some-package": "4.0"}
    monkeypatch.setattr(known, "package_version", installed.get)
    op, pool, runner = two(external="some-package"), NotingPool(), FakeRunner(times)
    states, registry = tune(path, runner, pool, op=op)
    assert set(pool.asked) == {"triton"}
    assert len(configs(runner)) == len(set(configs(runner))) == 24
    (verdict,) = registry.verdicts()
    assert Config(verdict.config) == FASTEST
    assert verdict.sources == {"triton": op.digest, "other": "some-package 4.0"}
    theirs = [trial for trial in registry.trials() if trial.implementation == "other"]
    assert all("compiled" not in trial.facts for trial in theirs)
    assert states[0].compiled == len(pool.asked)
    assert tune(path, FakeRunner(times), op=op)[0][0].skipped
    installed["some-package"] = "4.1"
    newer = FakeRunner(times)
    tune(path, newer, op=op)
    assert configs(newer, "triton") == []
    assert FASTEST in configs(newer)


def test_equal_configs_of_an_external_one_tie_by_their_text(path):
    runner = FakeRunner(lambda c: 1.0 if c.implementation == "other" else 3.0, noise=0.001)
    _, registry = tune(path, runner, op=two(external="some-package"))
    (verdict,) = registry.verdicts()
    assert verdict.implementation == "other"
    tied = [Config(each["config"]).key for each in verdict.notes["tied"] if each["implementation"] == "other"]
    assert Config(verdict.config).key == min(tied)


def _revoke(path, config, **changes):
    with Registry.open(path, write=True) as registry:
        registry.revoke(Revocation("scaling_fwd", "other", "wrong", config=config, **changes))


def test_a_revocation_of_its_source_bears_on_it_and_ends_with_that_source(path):
    op = two()
    tune(path, FakeRunner(times), op=op)
    _revoke(path, dict(FASTEST), kernel=op.implementations["other"].digest)
    runner = FakeRunner(times)
    states, registry = tune(path, runner, op=op)
    assert states[0].revoked == 1
    assert Config(registry.verdicts()[0].config) != FASTEST
    changed = FakeRunner(times)
    states, registry = tune(path, changed, op=two(_rewritten))
    assert states[0].revoked == 0
    assert Config(registry.verdicts()[0].config) == FASTEST


def test_one_that_is_revoked_whole_is_not_run_and_ours_is_tuned(path):
    _revoke(path, {})
    runner = FakeRunner(times)
    states, registry = tune(path, runner, op=two())
    assert (states[0].error, configs(runner)) == ("", [])
    assert Config(registry.verdicts()[0].config) == BEST


def test_another_implementation_does_not_touch_the_digest_that_verdicts_are_stored_under():
    assert two().digest == two(_rewritten).digest == make_op().digest
    ours, other = two().implementations["triton"], two().implementations["other"]
    assert ours.digest == make_op().digest != other.digest
    assert other.digest == dataclasses.replace(other, space=SPACE).digest
    assert two(external="some-package").implementations["other"].digest == ""
    assert two().implementations["torch"].digest == ""
