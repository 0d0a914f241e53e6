"""Candidates that break the GPU, the process or the limits: each is classified, none stops the run or stays behind."""

import fcntl
import os

import pytest

pytest.importorskip("triton")

from injected_failures import CHEAP, EXPECTED, Report, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # the first test waits for the whole run

WORKERS = 10
COUNTS = {kind: 50 if kind in CHEAP else 5 for kind in EXPECTED}
"""A kind that kills its worker costs seconds each time; `benchmarks/injected.py` runs all at 50."""


ALONE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) == 1
"""Or other tests use the GPU at the same time."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of one run, however many test processes ask for it: the first runs, the others wait and read."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    file = base / "injected_failures.json"
    with open(base / "injected_failures.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            text = run(COUNTS, WORKERS, tmp_path_factory.mktemp("registries"), alone=ALONE).to_json()
            print(text)
            file.write_text(text)
    return Report.from_json(file.read_text())


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_candidate_is_classified_and_none_is_stored_as_good(report, kind):
    found = report.kinds[kind]
    assert sum(found.classes.values()) == COUNTS[kind]
    assert set(found.classes) <= EXPECTED[kind], found
    assert found.served == 0


def test_no_run_is_aborted(report):
    assert {kind: found.errors for kind, found in report.kinds.items() if found.aborted} == {}


def test_time_outs_end_within_five_seconds_of_their_limit(report):
    assert report.overrun_s <= 5


def test_no_process_is_left_behind(report):
    assert report.orphans == 0


@pytest.mark.skipif(not ALONE, reason="other test processes use the GPU's memory")
def test_no_memory_is_left_behind(report):
    assert report.memory_lost_mib <= 64
