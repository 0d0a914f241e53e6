"""How much sooner two GPUs of a Ray cluster are done than one: a suite's problems on each, from empty compile caches.

    python benchmarks/cluster.py --out benchmarks/results/nvidia-h200/cluster.json [--suite models] [--problems 20]
        [--ops NAME …] [--trials 24] [--workers N] [--alone] [--gpu NAME]

Each run has a registry, a compile cache and a cluster node of its own, and as many compilers a GPU (by default half of
the cores, less one). The problems are spread evenly over the suite. JSON: for each run its seconds from call to return,
and from the first problem's begin to the last one's end, which leaves out that hosts import PyTorch; what each problem
took, and where; and the ratios. `--alone` measures the same on one GPU without Ray, too. With `--gpu` cores stand for
GPUs, and nothing is measured: that tries the program, not the claim.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tuner"))

from compare import save
from ray_nodes import ray_nodes

from tilebook import device as devices
from tilebook import op as ops
from tilebook.device import Device
from tilebook.op import Op, Problem
from tilebook.tuner.cluster.cluster import tune_cluster
from tilebook.tuner.progress import ProblemState, Run
from tilebook.tuner.run import Outcome, tune_problems

Problems = Sequence[tuple[Op[Any], Problem]]


class Timeline:
    """When the first problem of a run began and the last one ended; says on stderr what is done."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.ended_at = 0.0
        self.seconds: dict[str, Any] = {}

    @contextmanager
    def __call__(self, run: Run) -> Iterator[None]:
        run.watchers.append(self)
        yield

    def changed(self, run: Run) -> None:
        if self.began is None and run.now:
            self.began = time.monotonic()

    def ended(self, run: Run, state: ProblemState, again: bool) -> None:
        self.ended_at = time.monotonic()
        name = f"{state.op} {state.label}"
        self.seconds[name] = {"seconds": round(state.seconds, 2), "where": state.where, "tried": state.tried}
        print(f"{len(run.done)}/{run.total} {state.where} {name}: {state.seconds:.1f} s {state.error}", file=sys.stderr)

    def told(self, run: Run, text: str) -> None:
        print(text, file=sys.stderr)


def spread(suite: str, count: int, gpu: Device, names: Sequence[str]) -> Problems:
    """So many of a suite's problems on these ops that our kernels run, evenly over it."""
    of_suite = dict.fromkeys(ops.suites(ops.ops().values())[suite])
    found = [(op, each) for op, each in of_suite if op.name in (names or [op.name]) and op.tunable.can_run(each, gpu)]
    if len(found) < count:
        raise SystemExit(f"the suite {suite} has {len(found)} problems, not {count}")
    return [found[place * len(found) // count] for place in range(count)]


def timed(tune: Callable[..., Outcome]) -> dict[str, Any]:
    """What a run took; ends the program where one of its problems failed."""
    timeline = Timeline()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        outcome = tune(registry=str(Path(folder) / "registry.db"), watch=timeline)
        seconds = time.monotonic() - began
    failed = [f"{state.op} {state.label}: {state.error}" for state in outcome.states if state.error]
    if failed or timeline.began is None:
        raise SystemExit("\n".join(failed) or "nothing was tuned")
    tuning_s = timeline.ended_at - timeline.began
    return {"seconds": round(seconds, 2), "tuning_s": round(tuning_s, 2), "problems": timeline.seconds}


def on_cluster(problems: Problems, gpus: int, options: dict[str, Any]) -> dict[str, Any]:
    measured, cores = options["gpu"] is None, (os.cpu_count() or 2) // 2
    with ray_nodes() as nodes, tempfile.TemporaryDirectory() as cache:
        # Without GPUs the cores are what there is more of.
        cpus = cores * gpus if measured else options["workers"] * gpus
        nodes.add("host", cpus=cpus, gpus=gpus if measured else 0, TRITON_CACHE_DIR=cache)
        return timed(lambda **more: tune_cluster(problems, nodes.address, **options, **more)[0])


def alone(problems: Problems, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        return timed(lambda **more: tune_problems(problems, **options, **more))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--suite", default="models")
    parser.add_argument("--ops", nargs="*", default=(), help="of the suite only the problems on these")
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2 - 1))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--gpu")
    given = parser.parse_args()
    device = devices.current() if given.gpu is None else devices.find(given.gpu)
    problems = spread(given.suite, given.problems, device, given.ops)
    options = {"gpu": given.gpu, "trials": given.trials, "workers": given.workers}
    runs = {"one": on_cluster(problems, 1, options), "two": on_cluster(problems, 2, options)}
    if given.alone:
        runs["alone"] = alone(problems, options)
    import ray

    figures = {
        "ray": ray.__version__,
        "suite": given.suite,
        "trials": given.trials,
        "workers": given.workers,
        "measured": given.gpu is None,
        "speedup": round(runs["one"]["seconds"] / runs["two"]["seconds"], 3),
        "tuning_speedup": round(runs["one"]["tuning_s"] / runs["two"]["tuning_s"], 3),
        "runs": runs,
    }
    save(given.out, "cluster", device.name, **figures)
    print(f"{given.problems} problems: one {runs['one']['seconds']} s, two {runs['two']['seconds']} s")
    print(f"{figures['speedup']}x, {figures['tuning_speedup']}x between the first begin and the last end")


if __name__ == "__main__":
    main()
