"""Programs killed with SIGKILL while they write to a registry, and while they bring an old one up to date.

    python benchmarks/reliability/kills.py [--kills 1000] [--migrations 50] [--seed 0] [--out FILE]

A writer says each trial's digest once it is stored, and is killed at a random moment; then the next reader must find
all that was said, and a registry that is whole. A migration is killed likewise; the next program must find every
verdict of the old registry, in the old schema or in the new one. No GPU needed.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "registry"))

from here import tell
from old_registry import make_old, old_verdicts
from registry_samples import problem, trial, verdict

from tilebook.registry import Registry

COPIES = 200
"""Of each old verdict: a migration long enough to be met in the middle."""


def _killed(job: Callable[[Callable[[str], object]], None], after_s: float) -> set[str]:
    """Runs the job in another process, kills it at that moment, and gives what it said."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            job(lambda line: os.write(theirs, f"{line}\n".encode()))
        finally:
            os._exit(0)
    os.close(theirs)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    with os.fdopen(ours) as said:
        lines = said.read().split("\n")[:-1]  # the last may have been cut
    os.waitpid(pid, 0)
    return set(lines)


def _write(path: Path, seed: int, say: Callable[[str], object]) -> None:
    draw = random.Random(seed)
    while True:
        trials = [trial(draw.randrange(1 << 30)) for _ in range(4)]
        with Registry.open(path, write=True) as registry:
            registry.record(trials, verdict(problem=problem(8 * draw.randrange(1, 4000))))
        for each in trials:
            say(each.sha256)


def writers(folder: Path, count: int, seed: int) -> list[str]:
    """Kills so many writers, ten to a registry; what was wrong afterwards."""
    wrong, draw = [], random.Random(seed)
    promised: set[str] = set()
    path = folder / "none.db"
    for number in range(count):
        if number % 10 == 0:
            path, promised = folder / f"{number}.db", set()
            with Registry.open(path, write=True) as registry:
                registry.record([trial(0)])
        job = functools.partial(_write, path, seed * 1_000_003 + number)
        promised |= _killed(job, draw.uniform(0.002, 0.12))
        try:
            with Registry.open(path, write=draw.random() < 0.5) as registry:
                there = {each.sha256 for each in registry.trials()}
                wrong += [f"kill {number}: {each}" for each in registry.problems]
        except Exception as error:
            wrong.append(f"kill {number}: {type(error).__name__}: {error}")
            with Registry.open(path, write=True) as registry:
                there = {each.sha256 for each in registry.trials()}
        if lost := len(promised - there):
            wrong.append(f"kill {number}: {lost} trials lost")
        wrong += _unsound(path, number)
    return wrong


def _unsound(path: Path, number: int) -> list[str]:
    with sqlite3.connect(path) as connection:
        found = connection.execute("PRAGMA integrity_check").fetchone()[0]
        foreign = connection.execute("PRAGMA foreign_key_check").fetchall()
    return [] if found == "ok" and not foreign else [f"kill {number}: {found}, {len(foreign)} keys that lead nowhere"]


def migrations(folder: Path, count: int, seed: int) -> tuple[list[str], int]:
    """Kills so many migrations; what was wrong afterwards, and how many were met before their end."""
    wrong, met, draw = [], 0, random.Random(seed)
    contents = old_verdicts()
    many = [{**each, "problem": problem(8 * n)} for each in contents[:1] for n in range(1, COPIES)] + contents
    for number in range(count):
        path = folder / f"old{number}.db"
        make_old(str(path), many)
        done = _killed(functools.partial(_migrate, path), draw.uniform(0.01, 0.6))
        met += not done
        try:
            with Registry.open(path, write=True) as registry:
                there = len(registry.verdicts())
                wrong += [f"migration {number}: {each}" for each in registry.problems]
            if there != len(many):
                wrong.append(f"migration {number}: {len(many) - there} verdicts lost")
        except Exception as error:
            wrong.append(f"migration {number}: {type(error).__name__}: {error}")
        wrong += _unsound(path, number)
        path.unlink()
    return wrong, met


def _migrate(path: Path, say: Callable[[str], object]) -> None:
    with Registry.open(path, write=True):
        say("done")


def run(kills: int, olds: int, seed: int) -> dict[str, Any]:
    """Figures of one run, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = writers(Path(folder), kills, seed)
        lost, met = migrations(Path(folder), olds, seed)
    return {"kills": kills, "migrations": olds, "migrations_met": met, "seed": seed, "faults": wrong + lost}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--migrations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report = run(given.kills, given.migrations, given.seed)
    tell(report, given.out)
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
