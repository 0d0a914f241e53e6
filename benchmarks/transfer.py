"""How much of a config's lead over PyTorch's kernel is left on a problem that it was not tuned for.

    python benchmarks/transfer.py REGISTRY … --out benchmarks/results/nvidia-h200/transfer.json

Each problem of a registry with trials is left out in turn. What dispatch would then expect of it is the smallest lead
among the problems that are like it (`Problem.like`); what it would have got is the time of the nearest one's winner on
it, which is among its trials, since configs of a space are the same for all. The worst share that is left is what
`Problem.TRANSFER` may say at most.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from compare import save

from tilebook import op as ops
from tilebook.op import Problem
from tilebook.registry import Registry, Status

Times = dict[tuple[str, str], float]
"""(implementation, config) → ms"""


def trials(paths: list[str]) -> tuple[dict[tuple[str, Problem], Times], str]:
    """The fastest trial of each candidate, by op and problem, and the device that they were measured on."""
    found: dict[tuple[str, Problem], Times] = {}
    devices = set()
    for path in paths:
        with Registry.open(path) as registry:
            for trial in registry.trials():
                if trial.status is not Status.OK or trial.time_ms is None or trial.op not in ops.ops():
                    continue
                devices.add(trial.device.name)
                key = trial.op, ops.get(trial.op).problem.from_key(trial.problem)
                candidate = trial.implementation, str(sorted(trial.config.items()))
                times = found.setdefault(key, {})
                times[candidate] = min(trial.time_ms, times.get(candidate, math.inf))
    (device,) = devices
    return found, device


def ours(times: Times) -> tuple[tuple[str, str], float]:
    """Our fastest candidate and its time."""
    return min(((c, ms) for c, ms in times.items() if c[0] == "triton"), key=lambda each: each[1])


def theirs(times: Times) -> float:
    return min((ms for (name, _), ms in times.items() if name == "torch"), default=math.inf)


def rows(found: dict[tuple[str, Problem], Times]) -> list[dict[str, Any]]:
    both = {
        key: times for key, times in found.items() if theirs(times) < math.inf and any(n == "triton" for n, _ in times)
    }
    result = []
    for (name, problem), times in both.items():
        like = [
            (problem.apart(p), p.label, t)
            for (op, p), t in both.items()
            if op == name and problem.like(p) and p != problem
        ]
        if not like:
            continue
        expected = min(theirs(t) / ours(t)[1] for _, _, t in like)
        _, nearest, its = min(like, key=lambda each: each[:2])
        here = times.get(ours(its)[0])
        row: dict[str, Any] = {
            "op": name, "problem": problem.label, "dtype": problem.dtype, "config_of": nearest,
            "expected": round(expected, 3), "tuned": round(theirs(times) / ours(times)[1], 3),
        }  # fmt: skip
        if here is not None:
            row |= {"got": round(theirs(times) / here, 3), "left": round(theirs(times) / here / expected, 3)}
        result.append(row)
    return sorted(result, key=lambda row: row.get("left", math.inf))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("registries", nargs="+")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    found, device = trials(given.registries)
    result = rows(found)
    for row in result:
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")
    save(given.out, "what is left of a lead on a problem that a config was not tuned for", device, results=result)


if __name__ == "__main__":
    main()
