"""240 wrong candidates through the real worker, session and registry, on the CPU: none becomes a verdict."""

import pytest
from injected import problems
from injected_tune import tune_injected
from wrong import COUNT, KINDS, ROWS, SELDOM, WIDTH
from wrong_op import WRONG

from tilebook.tuner.worker import GpuRunner


@pytest.fixture(scope="module")
def runner():
    made = GpuRunner(0, modules=["wrong_op", "registered"], worker="cpu_worker")
    yield made
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_wrong_candidates_give_no_verdict(kind, tmp_path, runner):
    outcome = tune_injected(tmp_path / "registry.db", WRONG, problems(kind, COUNT, ROWS, WIDTH), runner)
    print(outcome)
    assert sum(outcome.classes.values()) == COUNT
    assert outcome.served == 0
    if kind not in SELDOM:
        assert set(outcome.classes) <= {"wrong_answer", "not_repeatable"}
        assert outcome.aborted == 0
