"""How long a tune takes from the command to the best kernel, on the GPU that is here and from an empty compile cache.

    python benchmarks/time_to_best.py --op attention_fwd --shape B8,H16,S2048,D128 --autotune --out FILE

Runs `tilebook tune` as a user would, everything included: starting processes, compiling, verifying, confirming in a
fresh process. JSON: each time the best of our configs so far got better, after how many seconds and candidates; what a
candidate took; how busy the GPU was. `--autotune` then times the same spaces in the way of `triton.autotune`, in one
process: every config compiled when its turn comes, then timed by `do_bench`, nothing verified. Both winners are sampled
interleaved beside PyTorch's own choice.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from compare import save

from tilebook import device as devices
from tilebook import op as ops
from tilebook.op import Config, Op, Problem, Space
from tilebook.registry import Registry, Trial, Verdict
from tilebook.tuner.measure import Bench, interleave
from tilebook.tuner.runner import Candidate
from tilebook.tuner.stats import median, speedup

ROUNDS = 30
SHARE = 0.98  # of what autotuning the whole spaces finds


def spaces(op: Op[Any], problem: Problem) -> dict[str, Space]:
    """Of our kernels that can run the problem here, by name."""
    gpu = devices.current()
    ours = [each for each in op.tunables if not each.external and each.can_run(problem, gpu)]
    return {each.name: each.space for each in ours if each.space is not None}


def climb(trials: Iterable[Trial], began: datetime, flops: float) -> list[dict[str, Any]]:
    """The candidates that were the best so far, in the order of time, each with the second at which it was stored."""
    steps: list[dict[str, Any]] = []
    for number, trial in enumerate(sorted(trials, key=lambda trial: trial.created_at), 1):
        if trial.time_ms is None or trial.failure is not None:
            continue
        if not steps or trial.time_ms < steps[-1]["time_ms"]:
            steps.append(
                {
                    "seconds": round((trial.created_at - began).total_seconds(), 2),
                    "tried": number,
                    "candidate": str(Candidate(trial.implementation, Config(trial.config))),
                    "time_ms": trial.time_ms,
                    "tflops": round(flops / trial.time_ms / 1e9, 1),
                }
            )
    return steps


def tuned(op: Op[Any], problem: Problem, shape: str, dtype: str, seed: int) -> tuple[dict[str, Any], Verdict]:
    """A tune by command line in a registry and a compile cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "registry.db"
        command = [sys.executable, "-m", "tilebook.cli", "tune", op.family, "--direction", op.direction]
        command += ["--shape", shape, "--dtype", dtype, "--seed", str(seed), "--registry", str(path)]
        began, start = datetime.now(UTC), time.monotonic()
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
        subprocess.run(command, stdout=sys.stderr, env=environment, check=True)
        seconds = time.monotonic() - start
        with Registry.open(path) as registry:
            trials, (verdict,) = registry.trials(), registry.verdicts()
    flops, gpu = problem.cost().flops, devices.current()
    own = spaces(op, problem)
    others = {
        each.implementation: round(flops / each.time_ms / 1e9, 1)
        for each in trials
        if each.implementation not in own and each.time_ms is not None
    }
    return {
        "seconds": round(seconds, 1),
        "feasible": {name: len(space.feasible(problem, gpu)) for name, space in own.items()},
        "candidates": len(trials),
        "seconds_a_candidate": round(seconds / len(trials), 3),
        "rejected": verdict.notes["rejected"],
        "spent": verdict.notes["seconds"],
        "gpu_busy": verdict.notes["busy"],
        "status": verdict.status,
        "winner": str(Candidate(verdict.implementation, Config(verdict.config))),
        "time_ms": verdict.time_ms,
        "tflops": None if verdict.time_ms is None else round(flops / verdict.time_ms / 1e9, 1),
        "best_so_far": climb([each for each in trials if each.implementation in own], began, flops),
        "others_tflops": others,
    }, verdict


def autotune(op: Op[Any], problem: Problem, limit_s: float) -> list[dict[str, Any]]:
    """Every config of our kernels' spaces, one after the other, in this process; fewer where the limit comes before."""
    import triton

    gpu, inputs = devices.current(), problem.inputs("cuda", 0)
    start, rows = time.monotonic(), list[dict[str, Any]]()
    for name, space in spaces(op, problem).items():
        for config in space.feasible(problem, gpu):
            if time.monotonic() - start > limit_s:
                return rows
            time_ms, call = None, functools.partial(op.implementations[name], *inputs, config=config)
            try:
                call()
                time_ms = triton.testing.do_bench(call, return_mode="median")
            except Exception as broken:
                print(f"{name} {config}: {type(broken).__name__}", file=sys.stderr, flush=True)
            seconds = round(time.monotonic() - start, 2)
            rows.append({"implementation": name, "config": dict(config), "time_ms": time_ms, "seconds": seconds})
    return rows


def autotuned(op: Op[Any], problem: Problem, limit_s: float) -> list[dict[str, Any]]:
    """The same in a process of its own, with an empty compile cache."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--op", op.name, "--key", problem.key, "--limit", str(limit_s)]
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "cache")}
        subprocess.run([*command, "--out", str(out)], env=environment, check=True, timeout=limit_s + 120)
        return list(json.loads(out.read_text()))


def against(op: Op[Any], problem: Problem, candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Interleaved samples of these and of PyTorch's own choice, the ratios to the last of `candidates`."""
    gpu = devices.current()
    bench = Bench(problem.inputs("cuda", 0), gpu.l2)
    samplers, running = [], [Candidate("torch"), *candidates]
    for each in running:
        implementation = op.implementations[each.implementation]
        config = None if implementation.space is None else each.config

        def run(*inputs: Any, _implementation: Any = implementation, _config: Config | None = config) -> Any:
            return _implementation(*inputs, config=_config)

        run(*bench.inputs[0])
        samplers.append(bench.capture(run, bench.estimate(run)))
    series = interleave(samplers, ROUNDS, 0)
    found = []
    for each, samples in zip(running, series, strict=True):
        ratio = speedup(series[-1], samples)
        figures = {"time_ms": median(samples), "tflops": round(problem.cost().flops / median(samples) / 1e9, 1)}
        found.append({"candidate": str(each), **figures, "speedup": [ratio.value, ratio.low, ratio.high]})
    return found


def compared(op: Op[Any], problem: Problem, ours: dict[str, Any], verdict: Verdict, limit_s: float) -> dict[str, Any]:
    rows = autotuned(op, problem, limit_s)
    timed = [row for row in rows if row["time_ms"] is not None]
    best = min(timed, key=lambda row: row["time_ms"])
    winners = (Candidate(verdict.implementation, Config(verdict.config)), _candidate(best))
    together = against(op, problem, winners)
    mine, theirs = together[-2:]
    # The search's own samples, at the scale of the interleaved ones.
    scale = mine["time_ms"] / min(step["time_ms"] for step in ours["best_so_far"])
    near = [s for s in ours["best_so_far"] if theirs["time_ms"] >= SHARE * s["time_ms"] * scale]
    return {
        "configs": len(rows),
        "whole": len(rows) == sum(ours["feasible"].values()),
        "failed": len(rows) - len(timed),
        "seconds": rows[-1]["seconds"],
        "best": str(winners[-1]),
        "interleaved": together,
        "share_of_its_best": mine["speedup"],
        "ours_there_after_s": near[0]["seconds"] if near else None,
        "share_of_its_time": round(near[0]["seconds"] / rows[-1]["seconds"], 3) if near else None,
        "our_whole_tune_of_its_time": round(ours["seconds"] / rows[-1]["seconds"], 3),
    }


def _candidate(row: dict[str, Any]) -> Candidate:
    return Candidate(row["implementation"], Config(row["config"]))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--op", required=True)
    arguments.add_argument("--shape")
    arguments.add_argument("--dtype", default="bf16")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--autotune", action="store_true")
    arguments.add_argument("--limit", type=float, default=400.0, help="seconds, of --autotune")
    arguments.add_argument("--key", help=argparse.SUPPRESS)  # of the process that autotunes
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    op = ops.get(given.op)
    if given.key is not None:
        with torch.no_grad():
            given.out.write_text(json.dumps(autotune(op, op.problem.from_key(given.key), given.limit)))
        return 0
    if given.shape is None:
        arguments.error("--shape is missing")
    if [each.name for each in ops.families()[op.family] if each.direction == op.direction] != [op.name]:
        arguments.error(f"the command line cannot tune {op.name} alone: take an op that is its family's only one")
    problem = op.problem.parse(given.shape, given.dtype)
    ours, verdict = tuned(op, problem, given.shape, given.dtype, given.seed)
    with torch.no_grad():
        other = compared(op, problem, ours, verdict, given.limit) if given.autotune else None
    found = {"op": op.name, "problem": problem.label, "dtype": given.dtype, "tilebook": ours, "triton.autotune": other}
    save(given.out, "time to the best kernel", devices.current().name, **found)
    print(f"{op.name} {problem.label}: {ours['candidates']} candidates, {ours['seconds']} s, {ours['tflops']} TFLOP/s")
    for step in ours["best_so_far"]:
        print(f"  {step['seconds']:7.1f} s  {step['tried']:4}  {step['tflops']} TFLOP/s  {step['candidate']}")
    if other is not None:
        share = ", ".join(f"{value:.3f}" for value in other["share_of_its_best"])
        print(f"  triton.autotune: {other['configs']} configs in {other['seconds']} s; ours {share} of its best")
    return 0


if __name__ == "__main__":
    sys.exit(main())
