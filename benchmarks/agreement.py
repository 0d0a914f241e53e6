"""Do tunes of one problem agree? Tunes it again and again, each time from another seed and with a registry of its own.

    python benchmarks/agreement.py --op attention_fwd --shape B4,H16,S2048,D128,causal --out FILE [--runs 21]
        [--dtype bf16] [--budget 540] [--workers N] [--sweep FILE]

On the GPU that is here; with --sweep over a recorded sweep instead, which needs none. Nothing that another run or a
shipped registry knows is a seed. Two runs *agree* if they name the same winner, or if each winner is in the other's tie
set. JSON: each run's winner and tie set, each pair. No run begins that would not end within --budget seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilebook import device as devices
from tilebook import op as ops
from tilebook.device import Device
from tilebook.op import Config, Op, Problem, UsageError
from tilebook.registry import Layers, Verdict
from tilebook.tuner.compile import CompilePool, Compilers
from tilebook.tuner.known import Known
from tilebook.tuner.progress import Run
from tilebook.tuner.recorded import Lane, Machine, recorded_op
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
    runs: int,
    budget_s: float,
) -> Iterator[tuple[Verdict, float]]:
    """Verdicts from seeds 0, 1, …, each with its seconds, as many as there is time for, and one at least."""
    began, longest = time.monotonic(), 0.0
    for seed in range(runs):
        start = time.monotonic()
        if seed and start - began + longest > budget_s:
            return
        verdict = tune_once(op, problem, gpu, versions, make(), seed)
        seconds = time.monotonic() - start
        longest = max(longest, seconds)
        yield verdict, seconds


def winner(verdict: Verdict) -> tuple[str, Config]:
    return verdict.implementation, Config(verdict.config)


def ties(verdict: Verdict) -> set[tuple[str, Config]]:
    tied: Any = verdict.evidence["tied"]
    return {(each["implementation"], Config(each["config"])) for each in tied}


def compared(one: Verdict, other: Verdict) -> dict[str, bool]:
    """`either`: one of the winners at least is in the other's tie set."""
    same = winner(one) == winner(other)
    there, back = winner(one) in ties(other), winner(other) in ties(one)
    return {"same": same, "agree": same or (there and back), "either": same or there or back}


def document(op: Op[Any], problem: Problem, found: Sequence[tuple[Verdict, float]]) -> dict[str, Any]:
    """What the runs came to, and what that says of each pair; `next` are the pairs of one run and the next."""
    verdicts = [verdict for verdict, _ in found]
    pairs = {
        (one, other): compared(verdicts[one], verdicts[other])
        for one, other in itertools.combinations(range(len(verdicts)), 2)
    }
    following = [pair for (one, other), pair in pairs.items() if other == one + 1]
    return {
        "benchmark": "agreement of tunes",
        "op": op.name,
        "problem": problem.label,
        "runs": [
            {
                "seed": seed,
                "status": verdict.status,
                "winner": {"implementation": verdict.implementation, "config": dict(verdict.config)},
                "time_ms": verdict.time_ms,
                "speedup": [verdict.speedup_low, verdict.speedup, verdict.speedup_high],
                "tied": verdict.evidence["tied"],
                "tried": verdict.evidence["tried"],
                "seconds": round(seconds, 2),
            }
            for seed, (verdict, seconds) in enumerate(found)
        ],
        "pairs": [{"runs": list(runs), **pair} for runs, pair in pairs.items()],
        "next": {"pairs": len(following), "agree": sum(pair["agree"] for pair in following)},
        "all": {"pairs": len(pairs), "agree": sum(pair["agree"] for pair in pairs.values())},
        "winners": len({winner(verdict) for verdict in verdicts}),
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


def replayed(sweep: Sweep, runs: int, budget_s: float) -> dict[str, Any]:
    """The same over a recorded sweep."""
    op = recorded_op(sweep)
    problem = op.problem.from_key(sweep.header["problem"])

    def make() -> Bench:
        machine = Machine(sweep)
        return Bench(machine, machine, Lane(machine))

    found = tunes(op, problem, sweep.device, sweep.header["environment"], make, runs, budget_s)
    return {**document(op, problem, list(found)), "sweep": True}


def measured(op: Op[Any], problem: Problem, runs: int, budget_s: float, workers: int | None) -> dict[str, Any]:
    """On the GPU that is here: the compilers stay, each run has measuring processes of its own."""
    if not devices.present():
        raise UsageError("there is no GPU here: give --sweep FILE to try it over a recorded sweep")
    gpu, versions = devices.current(), devices.environment()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(CompilePool(gpu, workers))

        def make() -> Bench:
            runner = GpuRunner()
            stack.callback(runner.close)
            runner.start()
            return Bench(pool, runner)

        found = []
        for verdict, seconds in tunes(op, problem, gpu, versions, make, runs, budget_s):
            found.append((verdict, seconds))
            print(f"run {len(found)}: {Config(verdict.config)}, {seconds:.1f} s", file=sys.stderr, flush=True)
    return {**document(op, problem, found), "device": gpu.name, "environment": dict(versions)}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--op")
    arguments.add_argument("--shape")
    arguments.add_argument("--dtype", default="bf16")
    arguments.add_argument("--runs", type=int, default=21)
    arguments.add_argument("--budget", type=float, default=540.0, help="seconds")
    arguments.add_argument("--workers", type=int)
    arguments.add_argument("--sweep", type=Path, help="replay this recorded sweep instead of measuring")
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    if (given.sweep is None) != bool(given.op and given.shape):
        arguments.error("give --op and --shape, or --sweep")
    if given.sweep is not None:
        result = replayed(read(given.sweep), given.runs, given.budget)
    else:
        op = ops.get(given.op)
        problem = op.problem.parse(given.shape, given.dtype)
        result = measured(op, problem, given.runs, given.budget, given.workers)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result))
    return 0 if reached(result) else 1


if __name__ == "__main__":
    sys.exit(main())
