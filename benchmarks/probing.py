"""What probing gains a program of shapes that nobody has tuned, what it costs the program, and what a tune gains.

    python benchmarks/probing.py --work /tmp/probing --out benchmarks/results/nvidia-h200/probing.json
    python benchmarks/probing.py --work /tmp/probing --only watch --seconds 500      # in parts, each of which goes on
    python benchmarks/probing.py --work /tmp/probing --only tune --budget 9m
    python benchmarks/probing.py --work /tmp/probing --only clock --out …
    python benchmarks/probing.py --dry-run --work /tmp/tried --out /tmp/tried.json   # no GPU, no figures

Problems of attention and norms are drawn by a seed, of no suite. *watch* is the program: all of them, forward and
backward, four calls of each in a row as layers make them, over and over, at first as it is and then with
`tilebook.probe()`, until all are settled or time is up. Its registry keeps what was observed, so that it goes on where
it ended. *tune* tunes the same problems. *clock* times every problem with neither, with what was observed and with what
was tuned, in turns, replayed from CUDA graphs. Each is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cells import DRAWN, Cell, drawn, tiny

LAYERS = 4
_KINDS = ("attention", "norms")
_BYTES = 60e9  # of inputs that are held at once
_REGISTRIES = ("before", "observed", "tuned")


def chosen(given: argparse.Namespace) -> list[Cell]:
    """The problems asked for, forward and backward."""
    pool = drawn(given.seed, given.problems * len(DRAWN) // len(_KINDS) + len(DRAWN))
    found = [cell for cell in pool if cell.kind in _KINDS and cell.step == "training"][: given.problems]
    return tiny(found) if given.dry_run else found


def registry(given: argparse.Namespace, name: str) -> str:
    return str(given.work / f"{name}.db")


def watch(given: argparse.Namespace, cells: list[Cell], device: str) -> dict[str, Any]:
    """The program, first without and then with probing."""
    import torch
    from yardsticks import inputs, our_step

    import tilebook
    from tilebook.dispatch import here

    order, steps, held = random.Random(given.seed), [], 0
    for cell in cells:
        made = inputs(cell, device)
        held += made.bytes
        if held > _BYTES:
            print(f"{len(cells) - len(steps)} problems do not fit into memory", flush=True)
            break
        steps.append((our_step(cell, made, device, False), made))

    def cycle() -> float:
        began = time.perf_counter()
        for step, made in order.sample(steps, len(steps)):
            for _ in range(LAYERS):
                step(made)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def cycles(until: float, least: int = 5) -> list[float]:
        found: list[float] = []
        while len(found) < least or time.perf_counter() < until:
            found.append(cycle())
            if here.prober is not None and len(found) >= least and here.prober.states and not _open(here.prober):
                break
        return found

    with tilebook.enabled():
        cycles(0.0)  # compiles and loads
        before = cycles(time.perf_counter() + min(20.0, given.seconds / 10))
        began = time.perf_counter()
        with tilebook.probe():
            prober = here.prober
            during = cycles(began + given.seconds)
            still = len(_open(prober))
            seconds = time.perf_counter() - began
        cycles(0.0)
        after = cycles(time.perf_counter() + min(20.0, given.seconds / 10))
    winners = Counter("PyTorch's" if each.implementation == "torch" else "ours" for each in prober.found)
    return {
        "problems": len(steps),
        "seconds": round(seconds, 3),
        "spent_s": round(prober.spent_s, 4),
        "share": round(prober.spent_s / seconds, 5),
        "most_ms": max((round(1e3 * each.spent_s, 2) for each in prober.states.values() if each), default=0.0),
        "cycle_ms": {
            name: round(1e3 * statistics.median(its), 3)
            for name, its in (("before", before), ("during", during), ("after", after))
        },
        # What cycles took longer than they did before, less what later ones gained: below zero where probing has paid.
        "longer": round(sum(during) / len(during) / statistics.median(before) - 1, 5),
        "found": dict(winners),
        "open": still,
        "tried": sum(each is not None for each in prober.states.values()),
    }


def _open(prober: Any) -> list[Any]:
    return [each for each in list(prober.states.values()) if each is not None and not each.done]


def tune(given: argparse.Namespace, cells: list[Cell]) -> float:
    """Tunes the problems into a registry of their own; seconds."""
    from tilebook import op as ops

    began = time.perf_counter()
    for kind in _KINDS:
        for dtype in ("bf16", "fp16"):
            shapes = [cell.label for cell in cells if (cell.kind, cell.dtype) == (kind, dtype)]
            asked = [word for label in dict.fromkeys(shapes) for word in ("--shape", label)]
            if asked:
                family, budget = ops.get(DRAWN[kind]).family, ["--budget", given.budget] if given.budget else []
                command = [sys.executable, "-m", "tilebook", "tune", family, "--dtype", dtype, *asked, *budget]
                subprocess.run([*command, "--registry", registry(given, "tuned")], check=True)
    return round(time.perf_counter() - began, 1)


class Served:
    """A step with a registry of its own, in the block in which its calls are made."""

    def __init__(self, its: Any, made: Any, path: str) -> None:
        self._its, self._made, self._path = its, made, path

    def __call__(self, made: Any) -> Any:
        return self._its(made)

    @contextmanager
    def around(self) -> Iterator[None]:
        from tilebook import dispatch

        os.environ["TILEBOOK_REGISTRY"] = self._path
        dispatch.reload()
        with self._its.around():
            for _ in range(3):  # a graph is captured of what is compiled and known
                self._its(self._made)
            yield


def clock(given: argparse.Namespace, cells: list[Cell], device: str) -> list[dict[str, Any]]:
    """ms of each problem by each registry, and how many times as fast it is as before."""
    import torch
    from race import Clock, quartiles, ratios
    from yardsticks import inputs, our_step

    its, rows = Clock(device, torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0), []
    names = [name for name in _REGISTRIES if name == "before" or Path(registry(given, name)).exists()]
    until = time.perf_counter() + given.most
    for cell in random.Random(given.seed).sample(cells, len(cells)):
        if time.perf_counter() > until:
            print("time is up", flush=True)
            break
        made = inputs(cell, device)
        steps = {name: Served(our_step(cell, made, device, False), made, registry(given, name)) for name in names}
        steps["again"] = Served(our_step(cell, made, device, False), made, registry(given, "before"))
        try:
            series = its.replayed(steps, its.rotated(made), given.rounds)
        except Exception as broken:
            print(f"{cell.name}: {type(broken).__name__}: {broken}"[:300], flush=True)
            continue
        rows.append(
            {
                "name": cell.name,
                "ms": {name: quartiles(series[name])[1] for name in series},
                "ratio": {name: ratios(series["before"], series[name]) for name in series if name != "before"},
            }
        )
    return rows


def gains(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all calls of the program together take less, in percent of before, and how much of a tune's gain that is."""
    total = {name: sum(row["ms"][name] for row in rows) for name in rows[0]["ms"]} if rows else {}
    found = {name: round(100 * (1 - ms / total["before"]), 3) for name, ms in total.items() if name != "before"}
    if found.get("tuned"):
        found["share"] = round(found.get("observed", 0.0) / found["tuned"], 4)
    return found


def main() -> None:
    given = _arguments().parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    device = "cpu" if given.dry_run else "cuda"
    cells, notes = chosen(given), given.work / "noted.json"
    noted: dict[str, Any] = {"watch": [], "tune_s": 0.0, "rows": []}
    if notes.exists():
        noted = json.loads(notes.read_text())
    if given.task == "watch":
        noted["watch"].append(watch(given, cells, device))
    elif given.task == "clock":
        noted["rows"] = clock(given, cells, device)
    if given.task:
        notes.write_text(json.dumps(noted))
        return
    for task in given.only.split(","):
        if task == "tune" and not given.dry_run:
            noted["tune_s"] += tune(given, cells)
            notes.write_text(json.dumps(noted))
        elif task != "tune":
            name = "observed" if task == "watch" else "before"
            environment = {**os.environ, "TILEBOOK_REGISTRY": registry(given, name)}
            environment.pop("TILEBOOK", None)
            command = [sys.executable, __file__, *sys.argv[1:], "--task", task]
            subprocess.run(command, env=environment, check=True)
            noted = json.loads(notes.read_text())
    print(json.dumps({**noted, "rows": len(noted["rows"]), "gain": gains(noted["rows"])}, indent=1))
    if given.out is not None:
        from compare import save

        from tilebook import device as devices

        told = {name: str(value) for name, value in vars(given).items() if name not in ("out", "work", "task")}
        where = "cpu" if given.dry_run else devices.current().name
        rows = sorted(noted["rows"], key=lambda row: row["ratio"].get("observed", [0, 1])[1])
        figures = {"watch": noted["watch"], "tune_s": noted["tune_s"], "gain": gains(rows), "results": rows}
        save(given.out, "probing", where, arguments=told, **figures)


def _arguments() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--work", type=Path, required=True, help="a folder for registries and what is noted")
    found.add_argument("--out", type=Path)
    found.add_argument("--only", default="watch,tune,clock", help="of watch, tune and clock")
    found.add_argument("--problems", type=int, default=200)
    found.add_argument("--seconds", type=float, default=500.0, help="of watching")
    found.add_argument("--most", type=float, default=560.0, help="seconds of clocking, which ends with what it has")
    found.add_argument("--budget", help="of a tune, of each kind and dtype")
    found.add_argument("--rounds", type=int, default=11)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--dry-run", action="store_true", help="tiny problems on the CPU: does the program run?")
    found.add_argument("--task", help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    main()
