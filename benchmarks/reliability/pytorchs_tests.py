"""Runs tests of PyTorch's own with tilebook and without, in processes of their own: what fails with it alone?

    python benchmarks/reliability/pytorchs_tests.py PYTORCH/test/test_transformers.py
        [--processes 6] [--part 0/1] [--seconds 540] [--json FILE]

The file is of a checkout of PyTorch, of the release that is installed or an older one, with what it imports beside it.
With tilebook means TILEBOOK=1, which needs tilebook to be installed. So many processes of each way share the GPUs; one
that dies goes on after the test that it died of. What has failed for want of memory, which they share too, is run once
more by one process. With a GPU only the tests of the GPU are run, without one those of the CPU. A part is taken by lot.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from here import environment, tell

HERE = Path(__file__).parent
WAYS = "plain", "tilebook"
FULL = "OutOfMemoryError", "out of memory", "ALLOC_FAILED"

Outcome = tuple[str, str]
"""passed, failed, skipped or died; and why."""
Found = dict[str, dict[str, Outcome]]
"""The outcome of each test, of each way."""


def gpus() -> int:
    count = "import torch; print(torch.cuda.device_count())"
    off = {**os.environ, "TILEBOOK": ""}
    return int(
        subprocess.run([sys.executable, "-c", count], check=True, capture_output=True, text=True, env=off).stdout
    )


def outcomes(file: Path) -> tuple[dict[str, Outcome], str]:
    """What became of each test, and the one that was under way at the end, if any."""
    found: dict[str, Outcome] = {}
    under_way = ""
    for line in file.read_text().splitlines() if file.exists() else ():
        word, test, *why = line.split("\t")
        if word == "began":
            under_way = test
            continue
        if word == "passed" and found.get(test, ("", ""))[0] == "failed":
            continue
        found[test] = word, "".join(why)
        under_way = ""
    return found, under_way


def run(file: Path, way: str, part: str, gpu: int, until: float, only: Path | None = None) -> dict[str, Outcome]:
    """The outcomes of a part of the tests, until then; again from where it died, while it comes on."""
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="tb-theirs-") as folder:
        told, done = Path(folder, "told"), Path(folder, "done")
        around = {**os.environ, "PART": part, "OUTCOMES": str(told), "LEFT_OUT": str(done), "OMP_NUM_THREADS": "1"}
        paths = [str(file.parent), str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        around["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        around["TILEBOOK"] = "1" if way == "tilebook" else ""
        around["PYTORCH_TESTING_DEVICE_ONLY_FOR"] = "cpu" if gpu < 0 else "cuda"
        if gpu >= 0:
            around["CUDA_VISIBLE_DEVICES"] = str(gpu)
        if only is not None:
            around["ONLY"] = str(only)
        command = [sys.executable, "-m", "pytest", "-p", "outcomes", "-c", os.devnull, "--rootdir", str(file.parent)]
        command += ["-p", "no:cacheprovider", "-q", "--tb=short", str(file)]
        while (left := until - time.monotonic()) > 0:
            done.write_text("\n".join(found))
            try:
                ended = subprocess.run(command, env=around, capture_output=True, text=True, timeout=left, check=False)
            except subprocess.TimeoutExpired:
                return {**found, **outcomes(told)[0]}
            more, under_way = outcomes(told)
            if under_way:
                more[under_way] = "died", f"exit code {ended.returncode}: {ended.stderr[-300:]}"
            if ended.returncode not in (0, 1, 5) and not more.keys() - found.keys():
                raise SystemExit(
                    f"{way}, part {part}: exit code {ended.returncode}\n{ended.stdout[-3000:]}{ended.stderr}"
                )
            found |= more
            if not under_way:
                break
    return found


def both(
    file: Path, processes: int, part: str, until: float, only: Path | None = None
) -> dict[str, dict[str, Outcome]]:
    which, of = map(int, part.split("/"))
    there = gpus()
    jobs = [(way, f"{which + n * of}/{processes * of}") for n in range(processes) for way in WAYS]
    found: Found = {way: {} for way in WAYS}
    with ThreadPoolExecutor(len(jobs)) as pool:
        places = [number % there if there else -1 for number in range(len(jobs))]
        each = partial(run, file, until=until, only=only)
        calls = [pool.submit(each, way, part, gpu) for (way, part), gpu in zip(jobs, places, strict=True)]
        for (way, _), call in zip(jobs, calls, strict=True):
            found[way] |= call.result()
    return found


def compared(file: Path, processes: int, part: str, seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    found = both(file, processes, part, until)
    full = {test for its in found.values() for test, (_, why) in its.items() if any(word in why for word in FULL)}
    if full:
        with tempfile.NamedTemporaryFile("w", suffix=".tests") as only:
            only.write("\n".join(full))
            only.flush()
            for way, its in both(file, 1, part, until, Path(only.name)).items():
                found[way] |= its
    plain, ours = (found[way] for way in WAYS)
    seen = sorted(plain.keys() & ours.keys())
    worse = {test: [*plain[test], *ours[test]] for test in seen if _bad(ours[test]) and not _bad(plain[test])}
    return {
        "tests": len(seen),
        "in_one_way_only": len(plain.keys() ^ ours.keys()),
        "outcomes": {f"{a}, {b}": n for (a, b), n in Counter((plain[t][0], ours[t][0]) for t in seen).most_common()},
        "again_for_want_of_memory": len(full),
        "worse_with_tilebook": worse,
    }


def _bad(outcome: Outcome) -> bool:
    return outcome[0] in ("failed", "died")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--processes", type=int, default=6, help="of each way")
    parser.add_argument("--part", default="0/1", help="which of how many")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--json", type=Path)
    given, around = parser.parse_args(), environment()
    found = compared(given.file.resolve(), given.processes, given.part, given.seconds)
    tell({"benchmark": "PyTorch's own tests", "environment": around, "part": given.part, "results": found}, given.json)
    if found["worse_with_tilebook"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
