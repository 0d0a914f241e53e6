"""Compiles every feasible config of every space for GPUs that need not be here, and counts what comes of it.

    python benchmarks/compile_spaces.py --gpu A100 --gpu H200 --gpu B200 --gpu MI300X --out FILE.json

One problem for each implementation that has a space, that of its op's suites with the largest. What a config does not
compile for it must be refused with a reason; the file counts both, with the reasons. The same command goes on with a
file that was cut short. Hours on two cores; `--most N` takes a random sample of N configs of each space.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from tilebook import device as devices
from tilebook import op as ops
from tilebook.op import Implementation, Op, Problem
from tilebook.tuner.process.compile import CompilePool


def compiled_ahead(op: Op[Any], gpu: devices.Device) -> list[Implementation]:
    """Our own kernel, and what else of ours has a space on this GPU."""
    return [each for each in op.tunables if not each.external and (each is op.tunable or each.available(gpu))]


def widest(implementation: Implementation, gpu: devices.Device) -> tuple[Problem, list[Any]]:
    """The problem of the op's suites with the most feasible configs on this GPU, and those."""
    op, space = implementation.op, implementation.space
    assert space is not None
    problems = {problem.key: problem for suite in op.problem.suites().values() for problem in suite}
    if implementation is not op.tunable:
        problems = {key: problem for key, problem in problems.items() if implementation.supports(problem)}
    sizes = {key: space.feasible(problem, gpu) for key, problem in problems.items()}
    key = max(sizes, key=lambda each: len(sizes[each]))
    return problems[key], list(sizes[key])


def compile_all(
    implementation: Implementation, gpu: devices.Device, pool: CompilePool, most: int | None
) -> dict[str, Any]:
    op, (problem, feasible) = implementation.op, widest(implementation, gpu)
    chosen = random.Random(0).sample(feasible, min(most or len(feasible), len(feasible)))
    start = time.monotonic()
    futures = [pool.submit(op.name, implementation.name, problem.key, config) for config in chosen]
    results = [future.result() for future in futures]
    reasons = Counter(f"{each.failure}: {each.reason}" for each in results if each.failure)
    return {
        "problem": problem.label,
        "kernel": implementation.digest,
        "feasible": len(feasible),
        "compiled": sum(each.failure is None for each in results),
        "refused": dict(Counter(each.failure for each in results if each.failure)),
        "without_reason": sum(bool(each.failure) and not each.reason for each in results),
        "reasons": dict(reasons.most_common(12)),
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpu", action="append", required=True, help="a GPU of the catalogue; repeatable")
    arguments.add_argument("--op", action="append", help="only this op; repeatable")
    arguments.add_argument("--most", type=int, help="configs of each space, chosen at random")
    arguments.add_argument("--workers", type=int)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    document: dict[str, Any] = {"benchmark": "compile spaces", "triton": triton.__version__, "results": {}}
    if given.out.exists():
        document = json.loads(given.out.read_text())
        if document["triton"] != triton.__version__:
            arguments.error(f"{given.out} is of Triton {document['triton']}, and this is {triton.__version__}")
    for gpu in map(devices.find, given.gpu):
        done = document["results"].setdefault(gpu.arch, {})
        with CompilePool(gpu, given.workers) as pool:
            chosen = [ops.get(name) for name in given.op or ops.ops()]
            for each in (each for op in chosen for each in compiled_ahead(op, gpu)):
                name = each.op.name if each is each.op.tunable else f"{each.op.name} {each.name}"
                if done.get(name, {}).get("kernel") == each.digest:
                    continue
                done[name] = compile_all(each, gpu, pool, given.most)
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(document, indent=1) + "\n")
                print(gpu.arch, name, {k: v for k, v in done[name].items() if k != "reasons"}, flush=True)


if __name__ == "__main__":
    main()
