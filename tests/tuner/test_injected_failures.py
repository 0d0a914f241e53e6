"""Candidates that break their worker in ten ways, through the real session: all classified, nothing left behind."""

import sys
import time
from pathlib import Path

import pytest
from injected import make_injected, problems
from injected_tune import tune_injected

from tilebook.tuner.process.child import Child
from tilebook.tuner.process.runner import GpuRunner, Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

EXPECTED = {
    "compile_error": {"compile_error"},
    "out_of_resources": {"out_of_resources"},
    "illegal_access": {"run_error", "worker_died"},
    "misaligned_access": {"run_error", "worker_died"},
    "trap": {"run_error", "worker_died"},
    "long_loop": {"run_timeout"},
    "ignored_sigterm": {"run_timeout"},
    "forked_child": {"run_error"},
    "unknown_exception": {"run_error", "worker_died"},
    "killed_worker": {"worker_died"},
}
COUNT, MOST = 24, 12  # of one problem
LIMIT_S = 0.15
FAILING = make_injected("toy_failing", lambda x, n: (x * 3, x * 5), {kind: lambda x, n: None for kind in EXPECTED})


def alive(mark: str) -> int:
    """Processes, forked ones included, whose command line has this word."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += mark.encode() in entry.read_bytes().split(b"\0")
        except OSError:
            continue
    return found


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", EXPECTED)
def test_bad_candidates_are_classified_and_none_is_stored_as_good(kind, tmp_path, monkeypatch):
    late = []
    original = Child.request

    def timed(child, message, timeout_s):
        began = time.monotonic()
        try:
            return original(child, message, timeout_s)
        finally:
            late.append(time.monotonic() - began - timeout_s if message["do"] == "attempt" else 0.0)

    monkeypatch.setattr(Child, "request", timed)
    mark = f"of_{tmp_path.name}"
    limits = Limits(attempt_s=LIMIT_S) if kind in ("long_loop", "ignored_sigterm") else Limits()
    runner = GpuRunner(0, limits=limits, modules=[mark], worker="toy_worker")
    try:
        outcome = tune_injected(tmp_path / "registry.db", FAILING, problems(kind, COUNT, most=MOST), runner)
        assert alive(mark) <= 2, "only the worker and its spare may run"
    finally:
        runner.close()
    assert sum(outcome.classes.values()) == COUNT
    assert set(outcome.classes) <= EXPECTED[kind]
    assert outcome.served == outcome.listed == 0
    assert [state.error for state in outcome.states] == [""] * len(outcome.states)
    assert outcome.aborted == 0
    assert max(late) <= 5
    assert alive(mark) == 0
