"""Do tunes of one problem agree? Tunes it again and again, each time from another seed and with a registry of its own.

    python benchmarks/agreement.py --op attention_fwd --shape B4,H16,S2048,D128,causal --out FILE [--runs 21]
        [--dtype bf16] [--budget 540] [--workers N] [--gpus all|0,1,…] [--sweep FILE]

On the GPU that is here, or side by side on several: a process for each, which gets its share of the runs and of the
compilers. With --sweep over a recorded sweep instead, which needs no GPU: --gpus then says how many processes replay.
Nothing that another run or a shipped registry knows is a seed. Two runs *agree* if they name the same winner, or if
each winner is in the other's tie set. JSON: each run's winner and tie set, each pair. No run begins that would not end
within --budget seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilebook import device as devices
from tilebook import op as ops
from tilebook.device import Device
from tilebook.op import Config, Op, Problem, UsageError
from tilebook.registry import Layers, Verdict
from tilebook.tuner.compile import CompilePool, Compilers
from tilebook.tuner.known import Known
from tilebook.tuner.progress import Run
from tilebook.tuner.recorded import Lane, Machine, recorded_op
from tilebook.tuner.run import indices
from tilebook.tuner.runner import GpuRunner, Runner
from tilebook.tuner.session import Options, Session
from tilebook.tuner.shards import tune_all
from tilebook.tuner.sweep import Sweep, read

WANTED = 0.95
"""Of the pairs that must agree: 19 of 20."""


@dataclass(frozen=True)
class Bench:
    """What a run is given: compilers, a runner, and the thread in front of it where it is not one of the session's."""

    pool: Compilers
    runner: Runner
    lane: Executor | None = None


def tune_once(
    op: Op[Any], problem: Problem, gpu: Device, versions: Mapping[str, str], bench: Bench, seed: int
) -> Verdict:
    """One tune into a registry that is thrown away. Raises RuntimeError where there is no verdict."""
    run = Run(1, True)
    with tempfile.TemporaryDirectory() as folder:
        layers = Layers([("explicit", str(Path(folder) / "registry.db"))])
        with layers.writer() as registry:
            known = Known(registry, layers, gpu, versions, "graph")
            session = Session(gpu, known, bench.pool, bench.runner, Options(seed=seed), run, lane=bench.lane)
            (state,) = tune_all([session], [(op, problem)], run)
    if state.verdict is None:
        raise RuntimeError(state.error)
    return state.verdict


def tunes(
    op: Op[Any],
    problem: Problem,
    gpu: Device,
    versions: Mapping[str, str],
    make: Callable[[], Bench],
    seeds: Sequence[int],
    budget_s: float,
) -> Iterator[dict[str, Any]]:
    """What came of a tune from each of these seeds, as many as there is time for, and of one at least.

    The first, which compiles for all the others, says nothing of how long these take.
    """
    began, longest = time.monotonic(), 0.0
    for number, seed in enumerate(seeds):
        start = time.monotonic()
        if number and start - began + longest > budget_s:
            return
        verdict = tune_once(op, problem, gpu, versions, make(), seed)
        seconds = time.monotonic() - start
        longest = max(longest, seconds) if number else 0.0
        yield outcome(seed, verdict, seconds)


def outcome(seed: int, verdict: Verdict, seconds: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "status": verdict.status,
        "winner": {"implementation": verdict.implementation, "config": dict(verdict.config)},
        "time_ms": verdict.time_ms,
        "speedup": [verdict.speedup_low, verdict.speedup, verdict.speedup_high],
        "tied": verdict.notes["tied"],
        "finalists": [
            {name: each.content()[name] for name in ("implementation", "config", "time_ms", "speedup")}
            for each in verdict.finalists
        ],
        "tried": verdict.notes["tried"],
        "seconds": round(seconds, 2),
    }


def named(candidate: Mapping[str, Any]) -> tuple[str, Config]:
    return candidate["implementation"], Config(candidate["config"])


def compared(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, bool]:
    """`either`: one of the winners at least is in the other's tie set."""
    mine, theirs = named(one["winner"]), named(other["winner"])
    there, back = mine in map(named, other["tied"]), theirs in map(named, one["tied"])
    return {
        "same": mine == theirs,
        "agree": mine == theirs or (there and back),
        "either": mine == theirs or there or back,
    }


def document(op: Op[Any], problem: Problem, outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs came to, in the order of their seeds, and what that says of each pair; `next` are the pairs of one
    run and the next."""
    runs = sorted(outcomes, key=lambda each: each["seed"])
    pairs = {
        (one, other): compared(runs[one], runs[other]) for one, other in itertools.combinations(range(len(runs)), 2)
    }
    following = [pair for (one, other), pair in pairs.items() if other == one + 1]
    return {
        "benchmark": "agreement of tunes",
        "op": op.name,
        "problem": problem.label,
        "runs": runs,
        "pairs": [{"runs": list(both), **pair} for both, pair in pairs.items()],
        "next": {"pairs": len(following), "agree": sum(pair["agree"] for pair in following)},
        "all": {"pairs": len(pairs), "agree": sum(pair["agree"] for pair in pairs.values())},
        "winners": len({named(each["winner"]) for each in runs}),
    }


def summary(result: Mapping[str, Any]) -> str:
    each = {name: f"{result[name]['agree']} of {result[name]['pairs']}" for name in ("next", "all")}
    most = max((len(run["tied"]) for run in result["runs"]), default=0)
    return (
        f"{result['op']} {result['problem']}: {len(result['runs'])} runs, {result['winners']} winners; "
        f"{each['next']} agree with the next, {each['all']} pairs in all; at most {most} tied"
    )


def reached(result: Mapping[str, Any]) -> bool:
    return bool(result["next"]["pairs"]) and result["next"]["agree"] >= WANTED * result["next"]["pairs"]


def replayed(sweep: Sweep, seeds: Sequence[int], budget_s: float) -> dict[str, Any]:
    """The same over a recorded sweep."""
    op = recorded_op(sweep)
    problem = op.problem.from_key(sweep.header["problem"])

    def make() -> Bench:
        machine = Machine(sweep)
        return Bench(machine, machine, Lane(machine))

    found = tunes(op, problem, sweep.device, sweep.header["environment"], make, seeds, budget_s)
    return {**document(op, problem, list(found)), "sweep": True}


def measured(
    op: Op[Any], problem: Problem, seeds: Sequence[int], budget_s: float, workers: int | None, index: int
) -> dict[str, Any]:
    """On GPU number `index` of this host: the compilers stay, each run has measuring processes of its own."""
    gpu, versions = devices.current(index), devices.environment()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(CompilePool(gpu, workers))

        def make() -> Bench:
            runner = GpuRunner(index)
            stack.callback(runner.close)
            runner.start()
            return Bench(pool, runner)

        found = []
        for each in tunes(op, problem, gpu, versions, make, seeds, budget_s):
            found.append(each)
            winner = Config(each["winner"]["config"])
            print(f"seed {each['seed']} on GPU {index}: {winner}, {each['seconds']} s", file=sys.stderr, flush=True)
    return {**document(op, problem, found), "device": gpu.name, "environment": dict(versions)}


def side_by_side(
    gpus: Sequence[int], runs: int, workers: int, command: Callable[[int, Sequence[int], int, Path], Sequence[str]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the processes wrote, one for each GPU: the first one's document, and the outcomes of all.

    command: how a process is started, from its GPU, its seeds, its compilers, and where it is to write. Raises
    RuntimeError where one fails.
    """
    shares = [range(place, runs, len(gpus)) for place in range(len(gpus))]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        paths = [Path(folder) / f"{gpu}.json" for gpu, seeds in zip(gpus, shares, strict=True) if seeds]
        started = []
        for gpu, seeds, path in zip(gpus, shares, paths, strict=False):
            process = subprocess.Popen(command(gpu, seeds, max(1, workers // len(paths)), path), stdout=sys.stderr)
            stack.callback(_end, process)
            started.append(process)
        for process in started:
            process.wait()
        lost = [gpu for gpu, path in zip(gpus, paths, strict=False) if not path.exists()]
        if lost:
            raise RuntimeError(f"the tunes failed on GPU {', '.join(map(str, lost))}")
        parts = [json.loads(path.read_text()) for path in paths]
    return parts[0], [each for part in parts for each in part["runs"]]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    process.wait()


def _parsed() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--op")
    arguments.add_argument("--shape")
    arguments.add_argument("--dtype", default="bf16")
    arguments.add_argument("--runs", type=int, default=21)
    arguments.add_argument("--seeds", help="these instead of 0 to --runs less one: numbers and commas")
    arguments.add_argument("--budget", type=float, default=540.0, help="seconds")
    arguments.add_argument("--workers", type=int, help="compile processes, all GPUs together")
    arguments.add_argument("--gpus", help="'all', or numbers such as 0,1")
    arguments.add_argument("--sweep", type=Path, help="replay this recorded sweep instead of measuring")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    if (given.sweep is None) != bool(given.op and given.shape):
        arguments.error("give --op and --shape, or --sweep")
    return given


def main() -> int:
    given = _parsed()
    sweep = None if given.sweep is None else read(given.sweep)
    if sweep is None and not devices.present():
        raise UsageError("there is no GPU here: give --sweep FILE to try it over a recorded sweep")
    cores = os.cpu_count() or 1
    gpus = indices(given.gpus, torch.cuda.device_count() if sweep is None else cores)
    op = ops.get(given.op) if sweep is None else recorded_op(sweep)
    problem = (
        op.problem.parse(given.shape, given.dtype) if sweep is None else op.problem.from_key(sweep.header["problem"])
    )
    seeds = range(given.runs) if given.seeds is None else [int(seed) for seed in given.seeds.split(",")]

    def command(gpu: int, seeds: Sequence[int], workers: int, path: Path) -> list[str]:
        what = ["--op", given.op, "--shape", given.shape, "--dtype", given.dtype, "--gpus", str(gpu)]
        what = what if sweep is None else ["--sweep", str(given.sweep)]
        part = [sys.executable, __file__, *what, "--seeds", ",".join(map(str, seeds)), "--budget", str(given.budget)]
        return [*part, "--workers", str(workers), "--out", str(path)]

    if len(gpus) > 1:
        # The processes that measure need a core each, or the GPUs wait for them.
        first, outcomes = side_by_side(gpus, given.runs, given.workers or cores - len(gpus), command)
        result = {**first, **document(op, problem, outcomes), "gpus": len(gpus)}
    elif sweep is not None:
        result = replayed(sweep, seeds, given.budget)
    else:
        result = measured(op, problem, seeds, given.budget, given.workers, gpus[0])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result))
    return 0 if reached(result) else 1


if __name__ == "__main__":
    sys.exit(main())
