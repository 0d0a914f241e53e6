"""Problems that no verdict is on, but others like them: what dispatch expects of them, and what it gets. On a GPU.

    python benchmarks/held_out.py --out benchmarks/results/nvidia-h200/held_out.json

Attention under padding: masks of keys alone, forward and backward, as a verdict's problem has them (lengths of a
quarter to all of the keys, gaps in some), and with nothing hidden, which is the worst for kernels that skip what is.
PyTorch's own call and the config that the nearest verdict has are captured as CUDA graphs over rotated inputs and
sampled in turns; PyTorch's takes part twice. Outputs must agree. Ratios are PyTorch's time over ours; *expected* is the
smallest lead of the verdicts that are like it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from compare import save

from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch import Snapshot
from tilebook.op import Config, Problem
from tilebook.tuner.judge.measure import Bench, interleave
from tilebook.tuner.judge.stats import speedup

SHAPES = (
    "B8,H12,S512,D64", "B16,H12,S512,D64", "B64,H12,S512,D64", "B128,H12,S128,D64", "B64,H16,S128,D64",
    "B64,H12,S256,D64", "B32,H16,S384,D64", "B24,H12,S200,D64", "B16,H12,S1024,D64", "B4,H12,S2048,D64",
    "B8,H16,S512,D128", "B8,H16,S1024,D128", "B2,H32,S2048,D128",
)  # fmt: skip
OPS = ("attention_fwd", "attention_bwd")
NEAR = 2e-2


def posed(shape: str, dtype: str, name: str) -> Problem:
    return ops.get(name).problem.parse(f"{shape},maskbk", dtype)


def inputs(problem: Problem, full: bool) -> tuple[Any, ...]:
    found = problem.inputs("cuda", 0)
    if full:
        for each in found:
            if isinstance(each, torch.Tensor) and each.dtype == torch.bool:
                each.fill_(True)
    return found


def nearest(snapshot: Snapshot, name: str, problem: Problem) -> tuple[Config, str, float] | None:
    """The config of ours in the nearest verdict that is like it, its problem, and the smallest lead of all."""
    op = ops.get(name)
    found = []
    for verdict, other in snapshot.verdicts(op):
        ours = [each for each in verdict.finalists if each.implementation == "triton" and each.time_ms]
        theirs = snapshot._theirs(op, verdict, other)
        if problem.like(other) and other != problem and ours and theirs is not None:
            lead = theirs / min(each.time_ms for each in ours if each.time_ms)
            found.append((problem.apart(other), other.label, Config(ours[0].config), lead))
    if not found:
        return None
    _, label, config, _ = min(found, key=lambda each: each[:2])
    return config, label, min(lead for *_, lead in found)


def alike(ours: Any, theirs: Any) -> bool:
    """Do outputs agree, each as a whole? What is no tensor of numbers, and log-sum-exps, are not compared."""
    for mine, its in zip(ours, theirs, strict=False):
        if mine is None or its is None or mine.dtype == torch.float32:
            continue
        if not (mine.double() - its.double()).norm() <= NEAR * its.double().norm():
            return False
    return True


def compared(name: str, problem: Problem, config: Config, full: bool, rounds: int) -> dict[str, Any]:
    op = ops.get(name)
    theirs = op.implementations["torch"]

    def plain(*given: Any) -> Any:
        return theirs(*given, config=None)

    def ours(*given: Any) -> Any:
        return op.tunable(*given, config=config)

    bench = Bench(inputs(problem, full), devices.current().l2)
    right = alike(ours(*bench.inputs[0]), plain(*bench.inputs[0]))
    samplers = [bench.capture(run, bench.estimate(run)) for run in (plain, ours, plain)]
    first, mine, again = interleave(samplers, rounds, 0)
    lead, noise = speedup(first, mine), speedup(first, again)
    return {
        "lead": [round(x, 4) for x in (lead.low, lead.value, lead.high)],
        "noise": round(noise.value, 4),
        "right": right,
        "ms": {"pytorch": sorted(first)[len(first) // 2], "tilebook": sorted(mine)[len(mine) // 2]},
    }  # fmt: skip


def warmed(asked: tuple[str, str, str, Config]) -> None:
    """Compiles what will be timed."""
    name, shape, dtype, config = asked
    ops.get(name).tunable(*inputs(posed(shape, dtype, name), False), config=config)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--registry")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=8)
    given = parser.parse_args()
    snapshot = Snapshot(devices.current(), given.registry)
    asked = [(shape, "bf16") for shape in SHAPES] + [(shape, "fp16") for shape in SHAPES[1:3]]
    chosen = []
    for name in OPS:
        for shape, dtype in asked:
            if (found := nearest(snapshot, name, posed(shape, dtype, name))) is None:
                print(f"{name} {shape} {dtype}: nothing is like it", flush=True)
            else:
                chosen.append((name, shape, dtype, *found))
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        pool.map(warmed, [each[:4] for each in chosen], 1)
    rows = []
    for name, shape, dtype, config, label, expected in chosen:
        for full in (False, True):
            row = {"op": name, "problem": f"{shape},maskbk", "dtype": dtype, "hidden": "none" if full else "padding"}
            row |= {"config_of": label, "config": dict(config), "expected": round(expected, 4)}
            try:
                row |= compared(name, posed(shape, dtype, name), config, full, given.rounds)
                row["left"] = round(row["lead"][1] / expected, 4)
            except Exception as broken:
                row["failed"] = f"{type(broken).__name__}: {broken}"[:300]
            rows.append(row)
            kept = {key: value for key, value in row.items() if key not in ("config", "op")}
            print(name, json.dumps(kept), flush=True)
            save(given.out, "problems that no verdict is on", devices.current().name, results=rows)


if __name__ == "__main__":
    main()
