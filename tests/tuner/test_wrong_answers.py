"""240 wrong candidates through the real worker, session and registry, on the CPU: none becomes a verdict."""

import itertools

import pytest
import torch
from injected import problems
from injected_tune import tune_injected
from product_op import PROBLEMS, PRODUCT
from wrong import COUNT, KINDS, ROWS, SELDOM, WIDTH
from wrong_op import WRONG

from tilebook.tuner.judge.verify import Wrong, final_cases, trial_cases, verify
from tilebook.tuner.process.runner import GpuRunner


@pytest.fixture(scope="module")
def runner():
    made = GpuRunner(0, modules=["wrong_op", "registered"], worker="cpu_worker")
    yield made
    made.close()


@pytest.mark.usefixtures("forked")
@pytest.mark.sampled(12)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_wrong_candidates_give_no_verdict(kind, tmp_path, runner):
    outcome = tune_injected(tmp_path / "registry.db", WRONG, problems(kind, COUNT, ROWS, WIDTH), runner)
    assert sum(outcome.classes.values()) == COUNT
    assert outcome.served == outcome.aborted == 0
    assert outcome.listed == 0 or kind == "racy"  # ten finalists, of which one of 400 gets through: see FINAL_REPEATS
    if kind not in SELDOM:
        assert set(outcome.classes) <= {"wrong_answer", "not_repeatable"}


@pytest.fixture
def one_thread():
    """Small products wait for each other's threads most of the time, where there are others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 3])
def test_of_three_hundred_right_candidates_at_most_one_is_refused(step):
    tried, refused, turns = 0, [], itertools.count()
    for problem in PROBLEMS:
        trial, final = trial_cases(PRODUCT, problem, "cpu"), final_cases(PRODUCT, problem, "cpu", 0)
        for config in PRODUCT.tunable.space.configs():
            if next(turns) % step:
                continue
            tried += 1
            try:
                verify(PRODUCT.tunable, config, trial)
                verify(PRODUCT.tunable, config, final)
            except Wrong as wrong:
                refused.append(f"{problem.dtype} {config}: {wrong}")
    assert tried == 300 // step
    assert len(refused) <= 1, "\n".join(refused)
