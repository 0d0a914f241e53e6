"""Compiles every feasible config of every space for a GPU that need not be here, and counts what comes of it.

    python benchmarks/compile_spaces.py --gpu H200 [--op attention_fwd] [--most 300] [--workers 2]

With --most, a random sample of that many configs of each space; without, all of them: hours on two cores.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter

from tilebook import device as devices
from tilebook import op as ops
from tilebook.tuner.compile import CompilePool


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gpu", action="append", required=True, help="a GPU of the catalogue; repeatable")
    arguments.add_argument("--op", action="append", help="only this op; repeatable")
    arguments.add_argument("--most", type=int, help="configs of each space, chosen at random")
    arguments.add_argument("--workers", type=int)
    given = arguments.parse_args()
    for gpu in map(devices.find, given.gpu):
        with CompilePool(gpu, given.workers) as pool:
            for op in [ops.get(name) for name in given.op or ops.ops()]:
                problem = [p for suite in op.problem.suites().values() for p in suite][-1]
                assert op.tunable.space is not None
                feasible = op.tunable.space.feasible(problem, gpu)
                chosen = random.Random(0).sample(feasible, min(given.most or len(feasible), len(feasible)))
                start = time.monotonic()
                futures = [pool.submit(op.name, op.tunable.name, problem.key, config) for config in chosen]
                results = [future.result() for future in futures]
                seconds = time.monotonic() - start
                counts = Counter(each.failure or "compiled" for each in results)
                print(
                    f"{gpu.arch} {op.name} {problem.label}: {len(chosen)} of {len(feasible)} in {seconds:.0f} s "
                    f"({seconds / max(1, len(chosen)):.2f} s each): {dict(counts)}",
                    flush=True,
                )
                for config, each in zip(chosen, results, strict=True):
                    if each.failure not in (None, "spills"):
                        print(f"  {config}: {each.failure}: {each.reason[:160]}", flush=True)


if __name__ == "__main__":
    main()
