"""How good the search is, on sweeps that an H200 measured: whole sessions are replayed over them."""

import random
import statistics
from pathlib import Path

import pytest

from tilebook.tuner.session import Options
from tilebook.tuner.sweeps.recorded import tune
from tilebook.tuner.sweeps.sweep import read

SWEEPS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200" / "sweeps"
SEEDS = range(5)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["attention_fwd-B4-H16-S2048-D128-causal-bf16", "mlp_down_fwd-M4096-H768-I3072-bf16"], ids=lambda n: n[:13]
)
def test_a_session_finds_the_best_config_early_and_is_not_behind_chance(name):
    sweep = read(SWEEPS / f"{name}.jsonl")
    everything = [each.attempt.time_ms or float("inf") for each in sweep.ours]
    best, count = min(everything), len(everything)
    runs = [tune(sweep, Options(seed=seed))[1].steps for seed in SEEDS]
    chance = [random.Random(seed).sample(everything, count) for seed in range(101)]

    def ours(share):
        reached = [min(step.time_ms for step in steps if step.number <= share * count) for steps in runs]
        return best / statistics.median(reached)

    assert ours(0.15) >= 0.98
    assert ours(0.30) >= 0.995
    for share in (0.05, 0.1, 0.15, 0.2, 0.3):
        assert ours(share) >= best / statistics.median(min(order[: int(share * count)]) for order in chance)
    assert all(max(step.number for step in steps) < count / 2 for steps in runs), "the sweeps are replayed to the end"
