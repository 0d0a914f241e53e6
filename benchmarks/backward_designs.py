"""The two designs of attention's backward on this GPU, seven products against five, beside cuDNN and PyTorch.

    python benchmarks/backward_designs.py --out FILE.json [--shape B8,H16,S2048,D128]... [--most N] [--dry-run]

Of `triton_reduce` the default and up to N configs that compile with hardly a spill, of every width and number of warps
in turn, first those of which more programs share an SM. Each candidate is verified, then timed, in a process that is
killed when it hangs; the fastest, `triton` with its default config and the other implementations are then sampled
interleaved, as CUDA graphs. `--dry-run` compiles for an H200 and measures nothing: it needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tilebook import device as devices
from tilebook.device import Device
from tilebook.occupancy import programs_per_sm
from tilebook.op import Config, Implementation, Op, Problem, get
from tilebook.tuner.process.compile import Compiled, CompilePool
from tilebook.tuner.process.runner import Attempt, Candidate, GpuRunner, Limits

SHAPES = (
    "B8,H16,S2048,D128",
    "B8,H16,S2048,D128,causal",
    "B8,H32,S2048,D64",
    "B8,H32,S2048,D64,causal",
    "B1,H16,S16384,D128,causal",
)
FINALISTS = 4
SPILLS = 160  # bytes a thread: what is the same in every step, and seldom read
COMPILED = 3  # times as many as are wanted
LIMITS = Limits(prepare_s=120.0, attempt_s=60.0, confirm_s=120.0)


def programs(compiled: Compiled, gpu: Device) -> int:
    """How many programs of the main kernel share an SM."""
    main = max(compiled.binaries, key=lambda each: each.registers * each.warps)
    return programs_per_sm(main.warps, main.registers, main.shared, gpu)


def in_turns(configs: Iterable[Config]) -> list[Config]:
    """One of each width and number of warps, then the next of each; widest first, for those add to dq fewest times."""
    groups: dict[tuple[int, int], list[Config]] = {}
    for config in configs:
        groups.setdefault((config.number("BLOCK_N"), config.number("num_warps")), []).append(config)
    layers = itertools.zip_longest(*(groups[key] for key in sorted(groups, reverse=True)))
    return [config for layer in layers for config in layer if config is not None]


def compile_some(
    ours: Implementation, problem: Problem, gpu: Device, pool: CompilePool, most: int
) -> list[tuple[Config, Compiled]]:
    """Configs that compile without spills, the most promising first; the default whatever it is."""
    assert ours.space is not None
    default = ours.space.default(problem, gpu)
    feasible = [config for config in ours.space.feasible(problem, gpu) if config != default]
    random.Random(0).shuffle(feasible)  # among equals, no axis is favoured
    feasible.sort(key=lambda config: -config.number("DESCRIPTORS"))
    tried = [default, *in_turns(feasible)[: COMPILED * most]]
    futures = {config: pool.submit(ours.op.name, ours.name, problem.key, config) for config in tried}
    compiled = {config: future.result() for config, future in futures.items()}

    def clean(config: Config) -> bool:
        each = compiled[config]
        return each.failure is None and all(binary.spills <= SPILLS for binary in each.binaries)

    def rank(config: Config) -> tuple[int, int]:
        return -config.number("DESCRIPTORS"), -programs(compiled[config], gpu)

    kept = in_turns(sorted(filter(clean, tried[1:]), key=rank))
    chosen = [default, *kept[: most - 1]]
    seen: set[str] = set()
    found = []
    for config in chosen:
        if compiled[config].fingerprint not in seen:
            seen.add(compiled[config].fingerprint)
            found.append((config, compiled[config]))
    print(f"{problem.label}: {len(feasible) + 1} feasible, {len(tried)} compiled, {len(kept)} kept", flush=True)
    return found


def facts(compiled: Compiled, gpu: Device) -> dict[str, int]:
    main = max(compiled.binaries, key=lambda each: each.registers * each.warps)
    shown = {"registers": main.registers, "spills": main.spills, "shared": main.shared}
    return shown | {"programs_per_sm": programs(compiled, gpu)}


def row(candidate: Candidate, attempt: Attempt, problem: Problem) -> dict[str, Any]:
    time_ms = attempt.time_ms
    return {
        "implementation": candidate.implementation,
        "config": dict(candidate.config),
        "failure": None if attempt.failure is None else attempt.failure.value,
        "reason": attempt.reason[:300],
        "time_ms": time_ms,
        "tflops": time_ms and problem.cost().flops / time_ms / 1e9,
    }


def show(each: dict[str, Any]) -> None:
    what = " ".join(f"{axis}={value}" for axis, value in each["config"].items())
    result = f"{each['time_ms']:.4f} ms {each['tflops']:.0f} TFLOP/s" if each["time_ms"] else each["failure"]
    print(f"  {each['implementation']:20} {what:100} {result} {each['reason'][:120]}", flush=True)


def measure(
    op: Op[Any], problem: Problem, gpu: Device, runner: GpuRunner, ours: list[tuple[Config, Compiled]], rounds: int
) -> dict[str, Any]:
    runner.prepare(op, problem)
    reference = op.tunable
    assert reference.space is not None
    others = [Candidate(reference.name, reference.space.default(problem, gpu))]
    others += [Candidate(i.name) for i in op.implementations.values() if i.space is None and i.can_run(problem, gpu)]
    compiled = {Candidate("triton_reduce", config): found for config, found in ours}
    tried, passed = [], []
    for candidate in [*others, *compiled]:
        attempt = runner.attempt(candidate, None)
        tried.append(row(candidate, attempt, problem))
        if candidate in compiled:
            tried[-1] |= facts(compiled[candidate], gpu)
        show(tried[-1])
        if attempt.failure is None and attempt.time_ms is not None:
            passed.append((attempt.time_ms, candidate))
    passed.sort(key=lambda pair: pair[0])
    best = [candidate for _, candidate in passed if candidate in compiled][:FINALISTS]
    finalists = [candidate for _, candidate in passed if candidate not in compiled] + best
    attempts = runner.confirm(finalists, rounds, 0) if finalists else []
    confirmed = [row(*pair, problem) for pair in zip(finalists, attempts, strict=True)]
    print("  interleaved:", flush=True)
    for each in sorted(confirmed, key=lambda found: found["time_ms"] or float("inf")):
        show(each)
    return {"problem": problem.label, "tried": tried, "interleaved": confirmed}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", action="append", help="repeatable")
    arguments.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    arguments.add_argument("--most", type=int, default=24, help="configs of triton_reduce a shape")
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--workers", type=int, help="compile processes")
    arguments.add_argument("--dry-run", action="store_true")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    gpu = devices.find("H200") if given.dry_run else devices.current()
    op = get("attention_bwd")
    ours = op.implementations["triton_reduce"]
    document: dict[str, Any] = {
        "benchmark": "designs of attention's backward",
        "device": gpu.name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {} if given.dry_run else dict(devices.environment()),
        "results": [],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    runner = None if given.dry_run else GpuRunner(limits=LIMITS)
    try:
        with CompilePool(gpu, given.workers) as pool:
            for text in given.shape or SHAPES:
                problem = op.problem.parse(text, given.dtype)
                found = compile_some(ours, problem, gpu, pool, given.most)
                if runner is None:
                    listed = [{"config": dict(config)} | facts(each, gpu) for config, each in found]
                    print(*listed, sep="\n", flush=True)
                    document["results"].append({"problem": problem.label, "compiled": listed})
                else:
                    document["results"].append(measure(op, problem, gpu, runner, found, given.rounds))
                given.out.write_text(json.dumps(document, indent=1) + "\n")  # after each: a run may be cut short
    finally:
        if runner is not None:
            runner.close()


if __name__ == "__main__":
    with torch.no_grad():
        main()
