"""One tuning run as the command line starts it: registry, compilers, GPU worker and view, put together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tilebook import device as devices
from tilebook.op import Op, Problem, UsageError
from tilebook.registry import Layers
from tilebook.report.live import view
from tilebook.report.rows import row
from tilebook.tuner.compile import CompilePool
from tilebook.tuner.progress import ProblemState
from tilebook.tuner.search import sampler
from tilebook.tuner.session import Options, Session
from tilebook.tuner.worker import GpuRunner


def _target(gpu: str | None) -> tuple[devices.Device, bool]:
    """The GPU model to tune for, and whether it is here to be measured."""
    if gpu is None:
        if not devices.present():
            raise UsageError("there is no GPU here: name a model with --gpu to compile and rank for it")
        return devices.current(), True
    named = devices.find(gpu)
    if devices.present() and named.name in devices.current().name:
        return devices.current(), True
    return named, False


def tune_problems(
    problems: Sequence[tuple[Op[Any], Problem]],
    *,
    gpu: str | None = None,
    registry: str | None = None,
    budget_s: float | None = None,
    trials: int | None = None,
    method: str = "tpe",
    workers: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> tuple[list[ProblemState], list[dict[str, Any]]]:
    """Tunes the problems and returns what happened to each, with the rows of their verdicts.

    Raises UsageError for an unknown GPU or search, RegistryError where the registry cannot be written.
    """
    device, here = _target(gpu)
    if method != "grid":
        sampler(method, seed)
    layers = Layers.default(registry)
    deadline = None if budget_s is None else time.monotonic() + budget_s
    options = Options(trials=trials, seed=seed, method=method, force=force)
    runner = GpuRunner() if here else None
    with layers.writer() as writer, CompilePool(device, workers) as pool:
        try:
            if runner is not None:
                runner.start()
            with view(len(problems), here, deadline) as run:
                environment = {k: v for k, v in devices.environment().items() if here or k not in ("driver", "cudnn")}
                session = Session(device, environment, writer, layers, pool, runner, options, run)
                states = session.tune_all(problems)
        finally:
            if runner is not None:
                runner.close()
    layer = layers.layers[0][0]
    return states, [row(state.verdict, layer) for state in states if state.verdict is not None]
