"""The search proposes feasible configs once each, and finds good ones sooner than chance."""

import statistics

import numpy as np
import pytest
from toy import SPACE, Scaling

from tilebook import device as devices
from tilebook.op import Config, UsageError
from tilebook.tuner.search import Search, promising, sampler

GPU = devices.find("H200")
PROBLEM = Scaling(1024, 1024)
FEASIBLE = SPACE.feasible(PROBLEM, GPU)


def _time(config: Config) -> float:
    """A smooth valley over the axes with its floor at BLOCK=128, num_warps=4, num_stages=3."""
    block, warps = config.number("BLOCK").bit_length() - 8, config.number("num_warps").bit_length() - 3
    return 1.0 + 0.2 * block**2 + 0.3 * warps**2 + 0.05 * (config.number("num_stages") - 3) ** 2


def _run(method: str, n: int, seed: int) -> float:
    search = Search(SPACE, FEASIBLE, [], method, seed)
    for _ in range(n):
        for config in search.ask(1):
            search.tell(config, _time(config))
    return search.best[1]


def test_seeds_come_first_and_an_infeasible_one_becomes_the_nearest_that_is_feasible():
    good, other = Config(BLOCK=128, num_warps=4, num_stages=3), Config(BLOCK=128, num_warps=4, num_stages=2)
    without = [config for config in FEASIBLE if config != other]
    nearest = Config(BLOCK=64, num_warps=4, num_stages=2)
    search = Search(SPACE, without, [good, other, FEASIBLE[0], nearest])
    assert nearest in without
    assert search.seeds == (good, nearest, FEASIBLE[0])
    assert search.ask(3) == [good, nearest, FEASIBLE[0]]


def test_seeds_of_a_space_with_nothing_feasible_are_none():
    assert Search(SPACE, [], FEASIBLE[:1]).seeds == ()


@pytest.mark.parametrize("method", ["tpe", "random", "grid", "cmaes"])
def test_every_feasible_config_is_proposed_exactly_once(method):
    if method == "cmaes":
        pytest.importorskip("cmaes")
    search, seen = Search(SPACE, FEASIBLE, [], method, 3), []
    while not search.exhausted:
        batch = search.ask(7)
        seen += batch
        for config in batch:
            search.tell(config, _time(config))
    assert sorted(seen, key=lambda c: c.key) == sorted(FEASIBLE, key=lambda c: c.key)


def test_tpe_beats_random_on_a_smooth_valley():
    tpe = statistics.median(_run("tpe", 30, seed) for seed in range(7))
    random = statistics.median(_run("random", 30, seed) for seed in range(7))
    assert tpe <= random


def test_same_seed_gives_the_same_proposals():
    assert Search(SPACE, FEASIBLE, [], "tpe", 5).ask(20) == Search(SPACE, FEASIBLE, [], "tpe", 5).ask(20)


def test_configs_that_do_not_run_are_told_and_never_best():
    search = Search(SPACE, FEASIBLE, [], "tpe", 0)
    first, second = search.ask(2)
    search.tell(first, None)
    search.tell(second, 2.0)
    assert search.best == (second, 2.0)


def test_polish_returns_the_unseen_feasible_neighbours():
    centre = Config(BLOCK=128, num_warps=4, num_stages=3)
    search = Search(SPACE, FEASIBLE, [centre])
    search.tell(*search.ask(1), 1.0)
    near = search.polish(centre)
    assert len(near) == 6
    assert search.polish(centre) == []


def test_unknown_sampler_is_a_usage_error_that_names_the_known_ones():
    with pytest.raises(UsageError, match="tpe"):
        sampler("genius", 0)


def test_the_first_batch_lies_around_the_seed_and_not_only_next_to_it():
    seed = Config(BLOCK=128, num_warps=4, num_stages=3)
    moved, farthest = [0] * 16, 0
    for number in range(40):
        first, *batch = Search(SPACE, FEASIBLE, [seed], "tpe", number).ask(17)
        assert first == seed
        assert len(set(batch)) == 16
        assert seed not in batch
        for place, config in enumerate(batch):
            steps = [abs(values.index(config[a]) - values.index(seed[a])) for a, values in SPACE.axes.items()]
            farthest = max(farthest, *steps)
            moved[place] += sum(step > 0 for step in steps)
    assert farthest > 1
    assert sum(moved[:4]) < sum(moved[-4:]), "those that differ least come first"


def test_the_model_looks_near_the_fast_and_away_from_what_is_under_way():
    told, log_ms = np.array([[0.0], [0.5], [1.0]]), np.log([3.0, 1.0, 3.0])
    unseen = np.array([[0.1], [0.4], [0.6], [0.9]])
    assert promising(told, log_ms, np.empty((0, 1)), unseen) in (1, 2)
    assert promising(told, log_ms, np.array([[0.45]]), unseen) == 2


def test_how_hopeless_a_config_is_makes_no_difference_to_the_model():
    told, unseen = np.array([[0.0], [0.3], [0.6], [1.0]]), np.linspace(0.05, 0.95, 10)[:, None]
    chosen = {
        promising(told, np.log([2.0, 1.5, 1.0, slowest]), np.empty((0, 1)), unseen) for slowest in (10.0, 1e3, 1e6)
    }
    assert len(chosen) == 1
