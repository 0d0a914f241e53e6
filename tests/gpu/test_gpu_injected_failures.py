"""Candidates that break the GPU, the process or the limits: each is classified, none stops the run or stays behind."""

import pytest

pytest.importorskip("triton")

from injected_failures import CHEAP, EXPECTED, run

pytestmark = pytest.mark.gpu

WORKERS = 10
COUNTS = {kind: 50 if kind in CHEAP else 5 for kind in EXPECTED}
"""A kind that kills its worker costs seconds each time; `benchmarks/injected.py` runs all at 50."""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    made = run(COUNTS, WORKERS, tmp_path_factory.mktemp("registries"))
    print(made.to_json())
    return made


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


def test_nothing_is_left_behind(report):
    assert report.orphans == 0
    assert report.memory_lost_mib <= 64
