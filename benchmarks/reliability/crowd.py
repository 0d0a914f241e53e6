"""Writers without pause and readers beside them, on one SQLite registry.

    python benchmarks/reliability/crowd.py [--writers 4] [--readers 16] [--minutes 10] [--out FILE]

A writer stores a batch of trials and a verdict, again and again, as a tuning run does. A reader is one program after
another: it *starts*, which opens the layers and reads what dispatch wants of them, looks up one new problem after
another (a *read*), and *ends*, with misses to store. Printed: errors, the times of all three, and whether all that
writers had stored is there. A read's time has three parts: what it computes, what it waits for a processor (`queued`,
of Linux alone: with fewer processors than processes that is most), and what it sleeps, for a lock or the disk.
`slowest_percent_ms` has the mean of each over the slowest hundredth of the reads. No GPU needed.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "registry"))

from here import tell
from registry_samples import H200, KERNEL, problem, trial, verdict

from tilebook.registry import Miss, Registry, canonical, serving
from tilebook.registry.lookup import Question

BATCH = 16
PARTS = ("cpu", "queued", "asleep")
LOOKUPS = 50
"""Of a program; ten milliseconds lie between two."""

FARTHEST = 4.0
"""From a problem, of one whose verdict is asked for in its place."""

FIRST = 200
"""Verdicts that are there before anybody reads or writes: more than dispatch reads as a whole."""


def _some_problem(draw: random.Random) -> str:
    return canonical({"rows": 8 * draw.randrange(1, 4000), "width": 1024, "dtype": "bf16"})


def _asked(problem: str) -> Question:
    """As dispatch asks: the verdict on a problem, or else the four nearest."""

    def distance(other: str) -> float:
        return abs(math.log2(json.loads(other)["rows"] / json.loads(problem)["rows"]))

    return Question("rms_norm_fwd", KERNEL, problem, most=4, distance=distance, reach=FARTHEST)


def _write(path: str, number: int, seconds: float, start: Any, results: Any) -> None:
    stored, errors, longest, draw = 0, [], 0.0, random.Random(number)
    start.wait()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        trials = [trial(1 + number * 10**7 + stored + place) for place in range(BATCH)]
        started = time.monotonic()
        try:
            with Registry.open(path, write=True) as registry:
                registry.record(trials, verdict(problem=_some_problem(draw)))
            stored += BATCH
        except Exception as error:
            errors.append(f"write: {type(error).__name__}: {error}")
        longest = max(longest, time.monotonic() - started)
    results.put({"stored": stored, "errors": errors, "longest_write_s": longest})


def _read(path: str, number: int, seconds: float, start: Any, results: Any) -> None:
    from tilebook.dispatch.misses import store_misses

    starts, reads, ends, errors, locked = [], [], [], [], 0
    missed, draw = [Miss("rms_norm_fwd", problem(number), H200, 3, 0.5)], random.Random(100 + number)
    start.wait()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        table = serving.read(H200.name, H200.arch, H200.sm_count, path)
        table.small("rms_norm_fwd")
        starts.append(time.monotonic() - began)
        for _ in range(LOOKUPS):
            asked, before = _asked(_some_problem(draw)), _spent()
            found = table.find(asked)
            clock, cpu, queued = (now - then for now, then in zip(_spent(), before, strict=True))
            reads.append({"read": clock, "cpu": cpu, "queued": queued, "asleep": max(0.0, clock - cpu - queued)})
            waited = table.locked
            locked += waited
            if not waited and found.exact is None and not found.near:
                errors.append("read: nothing was found")
            time.sleep(0.01)
        errors += [f"read: {each}" for each in table.problems if "locked by another process" not in each]
        began = time.monotonic()
        store_misses(missed)
        ends.append(time.monotonic() - began)
    results.put({"starts": starts, "reads": reads, "ends": ends, "errors": errors, "locked": locked})


def _spent() -> tuple[float, float, float]:
    """Seconds of the clock, of a processor, and of waiting for one, of this thread."""
    try:
        queued = int(_SCHEDULED.read_text().split()[1]) / 1e9
    except OSError:
        queued = 0.0
    return time.monotonic(), time.thread_time(), queued


_SCHEDULED = Path("/proc/thread-self/schedstat")


def run(writers: int, readers: int, seconds: float) -> dict[str, Any]:
    """Figures of one run, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "registry.db")
        os.environ |= {"TILEBOOK_REGISTRY": path, "XDG_DATA_HOME": folder}
        with Registry.open(path, write=True) as registry:
            registry.record([trial(0)], verdict())
            draw = random.Random(0)
            registry.merge((), [verdict(problem=_some_problem(draw)) for _ in range(FIRST)], ())
        context = multiprocessing.get_context("spawn")
        results, start = context.Queue(), context.Barrier(writers + readers)
        jobs = [(_write, n) for n in range(writers)] + [(_read, n) for n in range(readers)]
        processes = [context.Process(target=job, args=(path, n, seconds, start, results)) for job, n in jobs]
        for each in processes:
            each.start()
        found = [results.get(timeout=seconds + 120) for _ in processes]
        for each in processes:
            each.join(60)
        with Registry.open(path) as registry:
            there, damaged = len(registry.trials()), list(registry.problems)
    reads = sorted((read for each in found for read in each.get("reads", ())), key=lambda read: read["read"])
    slowest = reads[len(reads) - len(reads) // 100 - 1 :]
    starts, ends = (sorted(s for each in found for s in each.get(name, ())) for name in ("starts", "ends"))
    stored = sum(each.get("stored", 0) for each in found) + 1
    return {
        "writers": writers, "readers": readers, "seconds": seconds, "cpus": os.cpu_count(),
        "errors": sorted({text for each in found for text in each["errors"]}), "damaged": damaged,
        "trials_stored": stored, "trials_there": there, "reads": len(reads),
        "read_ms": _figures([each["read"] for each in reads]),
        **{f"read_{part}_ms": _figures(sorted(each[part] for each in reads)) for part in PARTS},
        "slowest_percent_ms": {part: _mean_ms([each[part] for each in slowest]) for part in ("read", *PARTS)},
        "reads_locked_out": sum(each.get("locked", 0) for each in found),
        "starts": len(starts), "start_ms": _figures(starts), "ends": len(ends), "end_ms": _figures(ends),
        "longest_write_s": max(each.get("longest_write_s", 0.0) for each in found),
    }  # fmt: skip


def _figures(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {name: round(1e3 * seconds[int(share * (len(seconds) - 1))], 2) for name, share in _SHARES.items()}


def _mean_ms(seconds: list[float]) -> float:
    return round(1e3 * sum(seconds) / max(1, len(seconds)), 2)


_SHARES = {"median": 0.5, "p99": 0.99, "most": 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--readers", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report = run(given.writers, given.readers, 60 * given.minutes)
    tell(report, given.out)
    return 1 if report["errors"] or report["damaged"] or report["trials_there"] < report["trials_stored"] else 0


if __name__ == "__main__":
    sys.exit(main())
