"""Runs injected failures on the GPU, several workers at a time, and says what became of them."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from failing_op import FAILING
from injected import Pair, problems
from injected_tune import tune_injected

from tilebook import device as devices
from tilebook.tuner.process.child import Child
from tilebook.tuner.process.processes import marked
from tilebook.tuner.process.runner import GpuRunner, Limits

EXPECTED = {
    "compile_error": {"compile_error"},
    "out_of_resources": {"out_of_resources"},
    "illegal_access": {"run_error", "worker_died"},
    "misaligned_access": {"run_error", "worker_died"},
    "trap": {"run_error", "worker_died"},
    "long_loop": {"run_timeout"},
    "ignored_sigterm": {"run_timeout"},
    "forked_child": {"run_error"},
    "unknown_exception": {"run_error"},
    "killed_worker": {"worker_died"},
}
CHEAP = ("compile_error", "out_of_resources", "forked_child", "unknown_exception")
"""The kinds that leave the worker alive; each of the others costs a new one, seconds of importing PyTorch."""

HANGING = ("long_loop", "ignored_sigterm")
LIMIT_S = 3.0
"""Of an attempt of the kinds that hang."""

_RUN = "INJECTED_FAILURES_RUN"  # names, in the environment of all that a run starts, the run
_SHARE = 7  # bad candidates of a problem whose every candidate costs a new worker


@dataclass
class Kind:
    """What became of one kind's candidates."""

    count: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    served: int = 0
    aborted: int = 0
    seconds: float = 0.0
    reason: str = ""
    errors: list[str] = field(default_factory=list)


@dataclass
class Report:
    kinds: dict[str, Kind]
    overrun_s: float  # of the worst time-out, until the worker was gone
    orphans: int
    memory_lost_mib: float | None  # None where other programs use the GPU, too: whose memory it is, nobody tells
    seconds: float

    def to_json(self) -> str:
        kinds = {name: {**vars(kind), "classes": dict(kind.classes)} for name, kind in self.kinds.items()}
        return json.dumps({**vars(self), "kinds": kinds}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        said = json.loads(text)
        kinds = {name: Kind(**{**kind, "classes": Counter(kind["classes"])}) for name, kind in said["kinds"].items()}
        return cls(**{**said, "kinds": kinds})


def run(counts: Mapping[str, int], workers: int, directory: Path, *, alone: bool = True) -> Report:
    """Tunes problems with so many bad candidates of each kind, `workers` at a time on the one GPU.

    alone: nothing else uses the GPU meanwhile, so that what memory is missing in the end was lost here.
    """
    torch.zeros(1, device="cuda")
    os.environ[_RUN] = name = uuid.uuid4().hex
    before, began, overruns = _free_mib(), time.monotonic(), _Overruns()
    kinds = {kind: Kind(count) for kind, count in counts.items()}
    tasks = [
        (kind, problem)
        for kind in sorted(counts, key=lambda k: (k not in HANGING, k in CHEAP))  # the longest first
        for problem in problems(kind, counts[kind], most=25 if kind in CHEAP else _SHARE)
    ]
    runners: dict[int, tuple[Limits, GpuRunner]] = {}
    lock = threading.Lock()

    def runner_of_this_thread(limits: Limits) -> GpuRunner:
        """One at a time: each holds two processes."""
        known = runners.get(threading.get_ident())
        if known is None or known[0] != limits:
            if known is not None:
                known[1].close()
            known = limits, GpuRunner(0, limits=limits, modules=["failing_op", "registered"])
            runners[threading.get_ident()] = known
        return known[1]

    def tune(number: int, kind: str, problem: Pair) -> None:
        start = time.monotonic()
        runner = runner_of_this_thread(Limits(attempt_s=LIMIT_S) if kind in HANGING else Limits())
        path = directory / f"{number}.db"
        outcome = tune_injected(path, FAILING, [problem], runner, devices.current(), devices.environment())
        with lock:
            found = kinds[kind]
            found.classes += outcome.classes
            found.served += outcome.listed
            found.aborted += outcome.aborted
            found.seconds += time.monotonic() - start
            found.reason = found.reason or next(iter(outcome.reasons), "")[:300]
            found.errors += [state.error for state in outcome.states if state.error]

    try:
        with overruns, ThreadPoolExecutor(workers) as pool:
            for each in [pool.submit(tune, number, *task) for number, task in enumerate(tasks)]:
                each.result()
    finally:
        for _, runner in runners.values():
            runner.close()
    seconds = time.monotonic() - began
    orphans = len(marked(f"{_RUN}={name}".encode()))
    lost = max(0.0, before - _settled_mib(before)) if alone else None
    return Report(kinds, overruns.worst_s, orphans, lost, seconds)


class _Overruns:
    """Watches every request to a child: how long after its limit one that timed out came back, the worker gone."""

    worst_s = 0.0

    def __enter__(self) -> None:
        self._request = original = Child.request

        def request(child: Child, message: Any, timeout_s: float) -> Any:
            began, answered = time.monotonic(), False
            try:
                reply = original(child, message, timeout_s)
                answered = True
                return reply
            finally:
                late = time.monotonic() - began - timeout_s
                if not answered and message["do"] == "attempt" and late > 0:
                    self.worst_s = max(self.worst_s, late)

        Child.request = request  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Child.request = self._request  # type: ignore[method-assign]


def _free_mib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**20


def _settled_mib(wanted: float) -> float:
    """Free memory once it is back, or after half a minute: a killed process's may take a moment."""
    deadline = time.monotonic() + 30
    while (free := _free_mib()) < wanted - 64 and time.monotonic() < deadline:
        time.sleep(0.2)
    return free
