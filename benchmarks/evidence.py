"""The figures behind a suite's verdicts: what each candidate took, from a registry's evidence, as JSON and a table.

    python benchmarks/evidence.py --suite fa --registry PATH --out benchmarks/results/nvidia-h200/fa.json

A verdict's candidates were sampled interleaved, 30 rounds in random order, in one process. `default` is our kernel's
default config, `tuned` the fastest of our kernels, `dispatched` what serves, `torch` what PyTorch's own function runs.
In verdicts of plain attention older than that rule `torch` is FlashAttention-2 on every GPU (see `gains.py`).
`current` says whether the verdict is of the kernels as they are now.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from tilebook import op as ops
from tilebook.op import Problem
from tilebook.registry import Registry, Verdict


def row(verdict: Verdict, problem: Problem) -> dict[str, Any]:
    op = ops.get(verdict.op)
    ours = {each.name for each in op.tunables if not each.external}
    assert verdict.default_time_ms is not None
    times = {"default": verdict.default_time_ms}
    for each in verdict.finalists:
        if each.time_ms is None:
            continue
        for kind in (each.implementation, "tuned") if each.implementation in ours else (each.implementation,):
            times[kind] = min(each.time_ms, times.get(kind, math.inf))
    here = (name for name, _ in verdict.ranking() if name in op.implementations)  # some finalists were removed since
    served = next(name for name in here if op.implementations[name].supports(problem))
    times["dispatched"] = times["tuned" if served in ours else served]
    flops = problem.cost().flops
    return {
        "op": verdict.op,
        "problem": problem.label,
        "measured_at": verdict.created_at.isoformat(timespec="seconds"),
        "winner": served,
        "current": verdict.kernel == op.digest,
        "times_ms": times,
        "tflops": {name: round(flops / ms / 1e9, 1) for name, ms in times.items()},
        "speedup_over_torch": round(times["torch"] / times["dispatched"], 4),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--suite", required=True)
    arguments.add_argument("--op", action="append", required=True, help="repeatable")
    arguments.add_argument("--registry", required=True)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    rows, environment = [], {}
    with Registry.open(given.registry) as registry:
        for name in given.op:
            op = ops.get(name)
            for problem in op.problem.suites()[given.suite]:
                found = [v for v in registry.verdicts(op=name, problem=problem.key) if v.measured]
                # Where no verdict of the kernels as they are now exists, one of how they were before, marked so.
                for verdict in sorted(found, key=lambda v: (v.kernel != op.digest, -v.created_at.timestamp()))[:1]:
                    rows.append(row(verdict, problem))
                    environment = dict(verdict.environment.versions)
    means = {
        name: math.exp(sum(math.log(r["speedup_over_torch"]) for r in rows if r["op"] == name) / count)
        for name in given.op
        if (count := sum(r["op"] == name for r in rows))
    }
    document = {"suite": given.suite, "environment": environment, "speedup_over_torch": means, "results": rows}
    given.out.write_text(json.dumps(document, indent=1) + "\n")
    for each in rows:
        shown = "  ".join(f"{name} {value:.0f}" for name, value in each["tflops"].items())
        print(f"{each['op']} {each['problem']}: {shown}  ({each['winner']}, {each['speedup_over_torch']:.2f}x)")
    print(means)


if __name__ == "__main__":
    main()
