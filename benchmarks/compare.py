"""Kernel against kernel on this GPU: default config, tuned config, what dispatch runs, and every other implementation.

    python benchmarks/compare.py --suite fa --out benchmarks/results/nvidia-h200/fa.json [--registry PATH]

Every candidate of a problem is captured as a CUDA graph over rotated inputs and sampled interleaved, in a new random
order each round, so ratios hold even where clocks drift. Each ratio stands with its bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from revision import revision

from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch import Snapshot
from tilebook.op import Config, Implementation, Op, Problem
from tilebook.tuner.judge.measure import Bench, interleave
from tilebook.tuner.judge.stats import median, speedup


def rms_off(found: torch.Tensor, right: torch.Tensor) -> float:
    """The RMS of the difference, relative to the RMS of what is right."""
    return ((found - right).square().mean().sqrt() / right.square().mean().sqrt()).item()


def save(out: Path, benchmark: str, device: str, **figures: Any) -> None:
    """Writes a benchmark's figures as JSON, with where, on what and when they were taken."""
    document = {
        "benchmark": benchmark,
        "device": device,
        "environment": dict(devices.environment()),
        "commit": revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


class _Parser(argparse.ArgumentParser):
    """One line where a GPU is asked for and there is none, before anything is loaded for it."""

    def parse_args(self, *args: Any, **more: Any) -> Any:
        given = super().parse_args(*args, **more)
        if given.device == "cuda" and not torch.cuda.is_available():
            self.exit(2, f"{self.prog}: there is no GPU here: --device cpu --tiny tries whether the program runs\n")
        return given


def arguments(description: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    """What every program takes that times models in turns."""
    found = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--out", type=Path, required=True, help="figures as JSON; a plot, if there is one, as PNG beside"
    )
    found.add_argument("--seconds", type=float, default=math.inf, help="begins nothing more after that")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--tiny", action="store_true", help="small, for a CPU: does the program run?")
    found.add_argument("--rounds", type=int, default=rounds)
    return found


def contenders(op: Op[Any], problem: Problem, snapshot: Snapshot) -> dict[str, tuple[Implementation, Config | None]]:
    """Name → what to run; `tuned` is the best config of our own kernel in the verdict, `dispatched` what serves.

    Others that have a space run with their best config in the verdict, or their default.
    """
    gpu, ours = snapshot.gpu, op.tunable
    assert ours.space is not None
    found: dict[str, tuple[Implementation, Config | None]] = {"default": (ours, ours.space.default(problem, gpu))}
    choice, tuned = snapshot.choose(op, problem), dict[str, Config]()
    if choice.source == "exact" and choice.verdict is not None:
        for each in choice.verdict.finalists:
            tuned.setdefault(each.implementation, Config(each.config))
        if ours.name in tuned:
            found["tuned"] = (ours, tuned[ours.name])
        found["dispatched"] = (choice.implementation, choice.config)
    for name, implementation in op.implementations.items():
        if implementation is not ours and implementation.can_run(problem, gpu):
            space = implementation.space
            found[name] = (implementation, None if space is None else tuned.get(name, space.default(problem, gpu)))
    return found


def compare(op: Op[Any], problem: Problem, snapshot: Snapshot, rounds: int) -> dict[str, Any]:
    running = contenders(op, problem, snapshot)
    bench = Bench(problem.inputs("cuda", 0), snapshot.gpu.l2)
    samplers, kept = [], []
    for name, (implementation, config) in running.items():

        def run(*inputs: Any, _i: Implementation = implementation, _c: Config | None = config) -> Any:
            return _i(*inputs, config=_c)

        try:
            run(*bench.inputs[0])
            samplers.append(bench.capture(run, bench.estimate(run)))
            kept.append(name)
        except Exception as broken:
            print(f"  {op.name} {problem.label}: {name}: {type(broken).__name__}: {broken}"[:300], flush=True)
    series = dict(zip(kept, interleave(samplers, rounds, 0), strict=True))
    cost = problem.cost()
    rows = {}
    for name, samples in series.items():
        ratio = speedup(series["torch"], samples)
        middle = median(samples)
        rows[name] = {
            "implementation": running[name][0].name,
            "config": dict(running[name][1] or {}),
            "time_ms": middle,
            "spread": (max(samples) - min(samples)) / middle,
            "tflops": cost.flops / middle / 1e9,
            "gbps": cost.bytes / middle / 1e6,
            "speedup_over_torch": [ratio.value, ratio.low, ratio.high],
        }
    return {"op": op.name, "problem": problem.label, "dtype": getattr(problem, "dtype", ""), "candidates": rows}


def geometric_means(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per op and group of problems, the geometric mean of each candidate's speed-up over PyTorch."""
    groups: dict[str, dict[str, list[float]]] = {}
    for each in results:
        fields = each["problem"].split(",")
        dims = [f for f in fields if f.startswith("D")]
        for group in {each["op"], *(f"{each['op']} {d}" for d in dims)}:
            for name, row in each["candidates"].items():
                groups.setdefault(group, {}).setdefault(name, []).append(row["speedup_over_torch"][0])
    return {
        group: {name: math.exp(sum(map(math.log, v)) / len(v)) for name, v in rows.items()}
        for group, rows in sorted(groups.items())
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--suite", required=True)
    arguments.add_argument("--family", action="append", help="only this kernel family; repeatable")
    arguments.add_argument("--registry")
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()

    snapshot = Snapshot(devices.current(), given.registry)
    chosen = [
        op for family, members in ops.families().items() if not given.family or family in given.family for op in members
    ]
    results = []
    for op, problem in ops.suites(chosen)[given.suite]:
        results.append(compare(op, problem, snapshot, given.rounds))
        times = "  ".join(f"{n} {r['time_ms']:.4g}" for n, r in results[-1]["candidates"].items())
        print(f"{op.name} {problem.label}: {times}", flush=True)
    means_of = geometric_means(results)
    save(
        given.out,
        f"compare {given.suite}",
        snapshot.gpu.name,
        rounds=given.rounds,
        geometric_mean_speedup_over_torch=means_of,
        results=results,
    )
    for group, means in means_of.items():
        print(group, "  ".join(f"{name} {mean:.3f}" for name, mean in means.items()))


if __name__ == "__main__":
    with torch.no_grad():
        main()
