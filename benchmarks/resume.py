"""Kills `tilebook tune` on a GPU at random moments, starts it again until it is done, and looks at what is left.

    python benchmarks/resume.py --op attention_fwd --shape B4,H16,S2048,D128,causal --out FILE [--kills 3]
        [--dtype bf16] [--seed 0] [--workers N]

First it lets one run be, in a registry of its own: how many trials that takes, and what it finds. Then, in another
registry, each run but the last is killed with SIGKILL at a random moment, chosen by its new trials and not by the
clock: what was compiled before is in Triton's cache, and a run that starts again gets on faster. JSON: for each kill
how many trials a reader had seen in the registry before it, are there after it, and were lost then or in the end; the
verdict, and whether its winner is in the tie set of the run that nobody killed. `benchmarks/kill_runs.py` does this
without a GPU, with many more kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "tuner"))

from killing import stored, ties

from tilebook import op as ops
from tilebook.op import Config
from tilebook.registry import Registry, RegistryError, Verdict

POLL_S = 0.05
LIMIT_S = 300.0
"""A run that takes longer than this is killed, and fails the program."""

Command = Callable[[Path], Sequence[str]]
"""How a run into this registry is started."""


@dataclass(frozen=True)
class Lived:
    """How a run went: its seconds, and all trials that were seen in its registry."""

    seconds: float
    seen: frozenset[str]
    status: int


@dataclass(frozen=True)
class Moment:
    """So many seconds after so many new trials were seen."""

    trials: int
    seconds: float


def looked(path: Path) -> frozenset[str]:
    """Digests of the trials that a reader finds while somebody else may be writing, none before there is a registry."""
    try:
        with Registry.open(path) as registry:
            return frozenset(trial.sha256 for trial in registry.trials())
    except (RegistryError, OSError):
        return frozenset()


def start(command: Sequence[str], path: Path, kill_at: Moment | None) -> Lived:
    """Runs the command, until it is killed at that moment if it lives so long. It writes to our stderr."""
    before = seen = looked(path)
    began, due_s = time.monotonic(), LIMIT_S
    process = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            lived_s = time.monotonic() - began
            if lived_s > LIMIT_S:
                raise RuntimeError(f"a run took longer than {LIMIT_S:.0f} s")
            if lived_s >= due_s:
                break
            seen |= looked(path)
            if kill_at is not None and due_s == LIMIT_S and len(seen - before) >= kill_at.trials:
                due_s = time.monotonic() - began + kill_at.seconds
            time.sleep(max(0.0, min(POLL_S, due_s - (time.monotonic() - began))))
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    return Lived(time.monotonic() - began, seen, process.returncode)


def resumed(command: Command, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """What became of a tune that was killed `kills` times. Raises RuntimeError where a run that nobody killed fails."""
    chance, kept = random.Random(seed), folder / "undisturbed.db"
    whole = start(command(kept), kept, None)
    expected = _verdict(kept, whole)
    most = max(1, len(whole.seen) // (kills + 1))  # so that all of them come before the verdict
    path, killed = folder / "killed.db", []
    for _ in range(kills):
        run = start(command(path), path, Moment(chance.randint(1, most), chance.uniform(0, 2 * POLL_S)))
        there, verdicts = stored(path)
        found = {trial.sha256 for trial in there}
        killed.append(
            {
                "seconds": round(run.seconds, 2),
                "status": run.status,
                "seen_before": len(run.seen),
                "stored_after": len(found),
                "lost": len(run.seen - found),
                "verdict": bool(verdicts),
                "trials": sorted(found),
            }
        )
        if verdicts:
            break
    last = start(command(path), path, None)
    verdict = _verdict(path, last)
    rows, _ = stored(path)
    end = {trial.sha256 for trial in rows}
    for each in killed:
        each["lost_in_the_end"] = len(set(each.pop("trials")) - end)
    configs = [Config(trial.config) for trial in rows if trial.config]
    return {
        "benchmark": "resumed after kills",
        "undisturbed": {"seconds": round(whole.seconds, 2), "trials": len(whole.seen), **_named(expected)},
        "wanted": kills,
        "kills": killed,
        "resumed": {"seconds": round(last.seconds, 2), "trials": len(end), **_named(verdict)},
        "measured_twice": len(configs) - len(set(configs)),
        "lost": sum(each["lost"] + each["lost_in_the_end"] for each in killed),
        "interrupted": sum(each["status"] == -signal.SIGKILL and not each["verdict"] for each in killed),
        "winner_in_tie_set": (verdict.implementation, Config(verdict.config)) in ties(expected),
    }


def _verdict(path: Path, run: Lived) -> Verdict:
    if run.status:
        raise RuntimeError(f"a run that nobody killed ended with status {run.status}")
    _, verdicts = stored(path)
    if len(verdicts) != 1:
        raise RuntimeError(f"{len(verdicts)} verdicts where there should be one")
    return verdicts[0]


def _named(verdict: Verdict) -> dict[str, Any]:
    return {
        "status": verdict.status,
        "winner": {"implementation": verdict.implementation, "config": dict(verdict.config)},
        "tied": len(ties(verdict)),
    }


def summary(result: dict[str, Any]) -> str:
    tied = "in" if result["winner_in_tie_set"] else "NOT in"
    return (
        f"{len(result['kills'])} kills, {result['interrupted']} before the verdict; {result['lost']} trials lost of "
        f"{sum(each['stored_after'] for each in result['kills'])} stored by then; winner {tied} the undisturbed tie set"
    )


def good(result: dict[str, Any]) -> bool:
    return not result["lost"] and result["winner_in_tie_set"] and result["interrupted"] == result["wanted"]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--op", required=True)
    arguments.add_argument("--shape", required=True)
    arguments.add_argument("--dtype", default="bf16")
    arguments.add_argument("--kills", type=int, default=3)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--workers", type=int)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    op = ops.get(given.op)
    if [each.name for each in ops.families()[op.family] if each.direction == op.direction] != [op.name]:
        arguments.error(f"the command line cannot tune {op.name} alone: take an op that is its family's only one")
    op.problem.parse(given.shape, given.dtype)  # a shape that is not understood fails here, not in a run

    def command(path: Path) -> list[str]:
        tune = [sys.executable, "-m", "tilebook.cli", "tune", op.family, "--direction", op.direction]
        tune += ["--shape", given.shape, "--dtype", given.dtype, "--seed", str(given.seed), "--registry", str(path)]
        return tune + (["--workers", str(given.workers)] if given.workers else [])

    with tempfile.TemporaryDirectory() as folder:
        result = resumed(command, Path(folder), given.kills, given.seed)
    result |= {"op": op.name, "problem": given.shape}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(result))
    return 0 if good(result) else 1


if __name__ == "__main__":
    sys.exit(main())
