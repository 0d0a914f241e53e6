"""One tuning run as the command line starts it: registry, compilers, GPU workers and view, put together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilebook import device as devices
from tilebook.op import Op, Problem, UsageError
from tilebook.registry import Layers
from tilebook.tuner.budget import Budget
from tilebook.tuner.hints import Hints
from tilebook.tuner.judge.measure import Mode
from tilebook.tuner.known import PREDICTED, Known
from tilebook.tuner.process.compile import CompilePool, check_cache
from tilebook.tuner.process.runner import GpuRunner
from tilebook.tuner.progress import ProblemState, Run, Watch
from tilebook.tuner.search import sampler
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import tune_all


def _target(gpu: str | None, gpus: str | None) -> tuple[devices.Device, list[int]]:
    """The GPU model to tune for, and the CUDA indices of those of it that are here to be measured on."""
    named = None if gpu is None else devices.find(gpu)
    if not devices.present():
        if gpus is not None:
            raise UsageError("--gpus: there is no GPU here")
        if named is None:
            raise UsageError("there is no GPU here: name a model, as in --gpu H200, to compile and rank for it")
        return named, []
    chosen = indices(gpus, torch.cuda.device_count())
    found = [devices.current(index) for index in chosen]
    models = sorted({f"{each.name} ({each.arch}, {each.sm_count} SMs)" for each in found})
    if len(models) > 1:
        raise UsageError(f"--gpus must name GPUs of one model, not {', '.join(models)}: run once for each")
    if named is not None and not devices.is_here(named, found[0]):
        if gpus is not None:
            raise UsageError(f"--gpu {named.name} with --gpus: the GPUs here are {found[0].name}")
        return named, []
    return found[0], chosen


def indices(gpus: str | None, count: int) -> list[int]:
    """The CUDA indices that `--gpus` names of `count` GPUs: "all", or numbers such as "0,1"; the first where it is not
    given. Raises UsageError on anything else."""
    if gpus is None:
        return [0]
    if gpus.strip().lower() == "all":
        return list(range(count))
    try:
        chosen = [int(part) for part in gpus.split(",")]
    except ValueError:
        raise UsageError(f"--gpus {gpus!r} is neither 'all' nor numbers such as 0,1") from None
    for index in chosen:
        if not 0 <= index < count:
            raise UsageError(f"--gpus {gpus!r}: there is no GPU {index}, only 0 to {count - 1}")
    return sorted(set(chosen))


def versions(environment: Mapping[str, str], measured: bool) -> dict[str, str]:
    """What of an environment a verdict depends on: one that was not measured, not on the GPU's libraries."""
    return {name: version for name, version in environment.items() if measured or name not in ("driver", "cudnn")}


@dataclass(frozen=True)
class Outcome:
    """What came of a run: the states of its problems, in their order; on which GPU model, in which registry layer.

    interrupted: by Ctrl-C.
    """

    states: Sequence[ProblemState]
    gpu: devices.Device
    layer: str
    interrupted: bool = False


def tune_problems(
    problems: Sequence[tuple[Op[Any], Problem]],
    *,
    gpu: str | None = None,
    gpus: str | None = None,
    mode: Mode = "graph",
    registry: str | None = None,
    budget_s: float | None = None,
    trials: int | None = None,
    method: str = "tpe",
    workers: int | None = None,
    seed: int = 0,
    force: bool = False,
    weights: Sequence[float] | None = None,
    hints: Hints | None = None,
    watch: Watch = contextlib.nullcontext,
) -> Outcome:
    """Tunes the problems and returns what happened to each, also after Ctrl-C.

    weights: what each is worth, so much of the budget it gets; by default the least time that a call takes. hints:
    configs to try first. watch: shows the run while it goes.
    Raises UsageError for an unknown GPU or search, RegistryError where the registry cannot be written.
    """
    budget = Budget(budget_s)
    device, chosen = _target(gpu, gpus)
    if method != "grid":
        sampler(method, seed)
    check_cache()
    layers = Layers.default(registry)
    options = Options(trials=trials, seed=seed, method=method, force=force, hints=hints)
    environment = versions(devices.environment(), bool(chosen))
    runners = [GpuRunner(index, mode) for index in chosen[: len(problems)]]
    # The processes that measure need a core each, or the GPUs wait for them.
    workers = workers or max(1, (os.cpu_count() or 1) - len(runners)) if runners else workers
    with layers.writer() as writer, CompilePool(device, workers) as pool:
        for runner in runners:
            runner.start()
        pool.start()
        budget.measured = bool(runners)
        run, interrupted = Run(len(problems), bool(runners), budget, max(1, len(runners))), False
        with watch(run):
            known = Known(writer, layers, device, environment, mode if runners else PREDICTED)
            sessions = [
                Session(device, known, pool, runner, options, run, index)
                for index, runner in zip(chosen, runners, strict=False)
            ] or [Session(device, known, pool, None, options, run)]
            try:
                states = tune_all(sessions, problems, run, weights)
            except KeyboardInterrupt:
                states, interrupted = run.done, True
    return Outcome(states, device, layers.layers[0][0], interrupted)
