"""Kills tuning runs at random moments and looks at what is left: `python killing.py COUNT`.
`python killing.py --into PATH SEED SECONDS` is one such run, for others to kill; a candidate takes so many seconds.

A program of its own, because it forks: each run is a process that has imported everything and started no thread.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fakes import FakeRunner, tune
from test_session import valley

from tilebook.op import Config
from tilebook.registry import Registry, RegistryError, Trial, Verdict
from tilebook.tuner.known import Known


class _SlowRunner(FakeRunner):
    """Takes a moment, so that a kill can come between any two steps."""

    attempt_s = 0.002

    def attempt(self, candidate, most_ms):
        time.sleep(self.attempt_s)
        return super().attempt(candidate, most_ms)

    def confirm(self, candidates, rounds, seed, *, fresh=False):
        time.sleep(0.02)
        return super().confirm(candidates, rounds, seed, fresh=fresh)


def _run(path: Path, seed: int, say: Callable[[str], object]) -> None:
    """A whole run; says each trial's digest once it is stored."""
    record = Known.record

    def telling(self: Known, trials=(), verdict=None) -> None:
        record(self, trials, verdict)
        for trial in trials:
            say(trial.sha256)

    Known.record = telling  # type: ignore[method-assign]
    tune(path, _SlowRunner(valley, seed=seed), trials=16)


def _forked(path: Path, seed: int, kill_after_s: float | None) -> tuple[set[str], float]:
    """Runs in another process, killed at that moment; what it said, and how long it lived."""
    ours, theirs = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _run(path, seed, lambda line: os.write(theirs, f"{line}\n".encode()))
            status = 0
        finally:
            os._exit(status)
    os.close(theirs)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(ours) as said:
        lines = said.read().split("\n")[:-1]  # the last may have been cut
    _, status = os.waitpid(pid, 0)
    assert kill_after_s is not None or status == 0, "a run that nobody killed failed"
    return set(lines), time.monotonic() - began


def stored(path: Path) -> tuple[list[Trial], list[Verdict]]:
    """What a killed run left in its registry, which is repaired where need be."""
    try:
        with Registry.open(path) as registry:
            return registry.trials(), registry.verdicts()
    except RegistryError:
        with Registry.open(path, write=True) as registry:  # killed while it made the file, or a journal to roll back
            return registry.trials(), registry.verdicts()


def ties(verdict: Verdict) -> set[tuple[str, Config]]:
    return {(each["implementation"], Config(each["config"])) for each in verdict.notes["tied"]}


def kill_runs(count: int, seed: int = 0) -> str:
    """Kills `count` runs, each at a random moment; raises AssertionError where one does not come back whole."""
    chance, interrupted, kept = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        _, whole_s = _forked(Path(folder) / "whole.db", seed, None)
        _, (expected,) = stored(Path(folder) / "whole.db")
        for number in range(count):
            path = Path(folder) / f"{number}.db"
            said, _ = _forked(path, seed, chance.uniform(0, whole_s))
            before, verdicts = stored(path)
            lost = said - {trial.sha256 for trial in before}
            assert not lost, f"run {number} lost {len(lost)} trials that it had stored"
            interrupted += not verdicts
            kept += len(before)
            _forked(path, seed + number, None)
            after, (verdict,) = stored(path)
            assert {trial.sha256 for trial in before} <= {trial.sha256 for trial in after}
            ours = [Config(trial.config) for trial in after if trial.config]
            assert len(ours) == len(set(ours)), f"run {number} measured a config twice"
            found = verdict.implementation, Config(verdict.config)
            assert found in ties(expected), f"run {number} came to another verdict: {found}"
    return f"{count} runs killed, {interrupted} before their verdict, {kept} trials stored by then, none lost"


if __name__ == "__main__":
    if sys.argv[1] == "--into":
        _SlowRunner.attempt_s = float(sys.argv[4])
        _run(Path(sys.argv[2]), int(sys.argv[3]), lambda digest: None)
    else:
        print(kill_runs(int(sys.argv[1])))
