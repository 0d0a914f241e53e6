"""Is tilebook ever slower than what people would have called instead? On this GPU, over suites and drawn problems.

    python benchmarks/never_slower.py --seconds 200 --out benchmarks/results/nvidia-h200/never_slower.json
    python benchmarks/never_slower.py --device cpu --tiny --seconds 60 --out /tmp/tried.json        # no GPU, no figures
    python benchmarks/never_slower.py --classes drawn --tune-a-tenth | sh           # then again with --classes drawn

Ratios are the time of PyTorch's own call over that of the same call with tilebook on, or of tilebook's function where
it takes no such call's place. For forms that PyTorch fuses no kernel for, it is the
best of PyTorch's function with a mask, `varlen_attn`, FlexAttention compiled and flash-attn-4. Cells come in batches in
an order drawn by a seed, so that a run that ends early has met a bit of all. A batch is first run by several processes,
which compile what is missing, judge the outputs against fp32 and note which kernels PyTorch runs in a process without
tilebook; then one new process times it. There calls alternate in a new random order each round: replayed from CUDA
graphs over inputs that the L2 cache cannot hold, and called eagerly, with the host's cost. PyTorch's call takes part
twice; the ratio of the two is the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cells import DRAWN, KINDS, Cell, drawn, of_suites, tiny

Row = dict[str, Any]

_STARTING_S = 20.0
"""What a batch costs before its first time is taken: two processes that import PyTorch and find the GPU."""

_PREPARING = 0.4
"""What part of the time left may go to a batch's compiling and judging."""

_GRACE_S, _ENDING_S = 12.0, 8.0
_OVER = 2.0, 1e-3  # an output may err by so many times PyTorch's own error, and so much


def chosen(given: argparse.Namespace) -> list[Cell]:
    """The cells asked for, in an order drawn by the seed."""
    wanted = given.classes.split(",") if given.classes else [*KINDS, "drawn"]
    found = [cell for cell in of_suites() if cell.kind in wanted and cell.source in given.suites.split(",")]
    if "drawn" in wanted:
        found += drawn(given.seed, given.drawn)
    if given.only:
        found = [cell for cell in found if given.only in cell.name]
    if given.tiny:
        found = tiny(found)
    random.Random(given.seed).shuffle(found)
    if given.sample:
        found = [cell for cell in found if [c for c in found if c.group == cell.group].index(cell) < given.sample]
    return found


def tune_a_tenth(cells: list[Cell]) -> list[str]:
    """Commands that tune every tenth of the drawn problems of each kind, to measure what that does for the others."""
    from tilebook import op as ops

    wanted: dict[tuple[str, str], list[str]] = {}
    for kind, op in DRAWN.items():
        problems = sorted({(cell.label, cell.dtype) for cell in cells if (cell.kind, cell.source) == (kind, "drawn")})
        for label, dtype in problems[::10]:
            wanted.setdefault((ops.get(op).family, dtype), []).append(f"--shape {label}")
    return [f"tilebook tune {family} --dtype {dtype} {' '.join(of)}" for (family, dtype), of in wanted.items()]


def without_flash4() -> None:
    """The package is as good as not installed in this process."""
    from tilebook.kernels.attention.peers import flash4

    flash4._installed = lambda: False
    sys.modules["flash_attn.cute"] = None  # type: ignore[assignment]


# What a process started for a batch does: prints one line of JSON a cell.


def _each(cells: list[Cell], until: float) -> Iterator[tuple[Cell, Row]]:
    """The cells until time is up. What a cell's body raises is noted in its row, and the next is taken."""
    for cell in cells:
        if time.time() > until:
            return
        row: Row = {"name": cell.name}
        yield cell, row
        print(json.dumps(row), flush=True)


def _kernels(step: Any, given: Any, device: str) -> list[str] | None:
    """The kernels that a call starts, each once and in order; on the CPU PyTorch's ops. None where nobody can tell."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        step(given)
        if cuda:
            import torch

            torch.cuda.synchronize()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    names = [each.name for each in seen.events() if each.device_type == kind]
    return list(dict.fromkeys(name[:160] for name in names if not name.startswith(("Mem", "mem")))) or None


def _free() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def note_kernels(cells: list[Cell], device: str, until: float) -> None:
    """What PyTorch's own call runs where tilebook was never imported."""
    from yardsticks import inputs, step, yardsticks

    for cell, row in _each([c for c in cells if c.kind not in ("forms", "packed")], until):
        try:
            made = inputs(cell, device)
            its = step(cell, yardsticks(cell, made, device)["torch"]())
            its(made)
            row["kernels"] = _kernels(its, made, device)
            del made, its
        except Exception as broken:
            row["failed"] = f"{type(broken).__name__}: {broken}"[:300]
        _free()
    assert "tilebook.dispatch" not in sys.modules


def judge(cells: list[Cell], device: str, until: float, workers: int, called: bool) -> None:
    """Runs every call, which compiles it, and says how far its outputs are from what fp32 has."""
    import torch
    from race import around
    from truth import errors, reference
    from yardsticks import inputs, our_step, step, yardsticks

    if device == "cuda":  # one that asks for too much must not take it from the others
        torch.cuda.set_per_process_memory_fraction(0.9 / (workers + 1))
    for cell, row in _each(cells, until):
        row["errors"] = found = dict[str, list[float]]()
        try:
            made = inputs(cell, device)
            truth = reference(cell, made)
            makers = {
                name: lambda make=make, cell=cell: step(cell, make())
                for name, make in yardsticks(cell, made, device).items()
            }
            makers["tilebook"] = lambda cell=cell, made=made: our_step(cell, made, device, called)
            for name, make in makers.items():
                try:
                    its = make()
                    with around(its):
                        for _ in range(3):  # the second call is the one that is kept as a plan
                            outputs = its(made)
                    found[name] = [round(each, 6) for each in errors(cell, outputs, truth)]
                    del outputs
                except Exception as broken:
                    row[f"{name} failed"] = f"{type(broken).__name__}: {broken}"[:300]
                    if name == "tilebook":
                        traceback.print_exc()
            del made, truth, makers
        except Exception as broken:
            row["failed"] = f"{type(broken).__name__}: {broken}"[:300]
            traceback.print_exc()
        _free()


def clock(cells: list[Cell], device: str, until: float, given: argparse.Namespace) -> None:
    """Times every call beside what people would have called."""
    import torch
    from race import Clock, around, quartiles, ratios
    from yardsticks import inputs, our_step, step, yardsticks

    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    its = Clock(device, l2)
    for cell, row in _each(cells, until):
        try:
            made = inputs(cell, device)
            steps = {}
            for name, make in yardsticks(cell, made, device).items():
                try:
                    steps[name] = step(cell, make())
                    steps[name](made)
                except Exception as broken:
                    steps.pop(name, None)
                    row[f"{name} failed"] = f"{type(broken).__name__}: {broken}"[:300]
            if not steps:
                raise RuntimeError("nothing else runs this call")
            known = set(_choices())
            steps["tilebook"] = our_step(cell, made, device, given.called)
            with around(steps["tilebook"]):
                steps["tilebook"](made)
            sets = its.rotated(made)
            for mode in given.modes.split(","):
                run = its.replayed if mode == "graph" else its.eager
                row[mode] = _compared(run, steps, sets, given.rounds, quartiles, ratios)
            for name in ("torch", "tilebook"):
                if name in steps:
                    with around(steps[name]):
                        row[f"kernels of {name}"] = _kernels(steps[name], made, device)
            row["served"] = _served(known)
            del made, steps, sets
        except Exception as broken:
            row["failed"] = f"{type(broken).__name__}: {broken}"[:300]
            traceback.print_exc()
        _free()


def _compared(run: Any, steps: dict[str, Any], sets: Any, rounds: int, quartiles: Any, ratios: Any) -> Row:
    """ms a call of each, and tilebook's ratio to the fastest of the others, which runs a second time for the noise."""
    others = [name for name in steps if name != "tilebook"]
    if len(others) > 1:  # which is the fastest shows in a few rounds
        first = run({name: steps[name] for name in others}, sets, 5)
        medians = {name: quartiles(series)[1] for name, series in first.items()}
        best = min(medians, key=lambda name: medians[name])
    else:
        best, medians = others[0], {}
    series = run({best: steps[best], "tilebook": steps["tilebook"], "again": steps[best]}, sets, rounds)
    if not {best, "tilebook", "again"} <= set(series):
        raise RuntimeError(f"of {best}, twice, and tilebook only {', '.join(series)} could be timed")
    return {
        "yardstick": best,
        "ms": {**medians, **{name: quartiles(series[name])[1] for name in (best, "tilebook")}},
        "ratio": ratios(series[best], series["tilebook"]),
        "noise": ratios(series[best], series["again"]),
    }


def _choices() -> dict[int, Any]:
    """What dispatch has decided so far."""
    from tilebook.dispatch import here

    return {id(choice): choice for choice in getattr(here, "_memo", {}).values()}


def _served(known: set[int]) -> list[str]:
    """What dispatch decided since, of calls that it was asked about: op, implementation and why."""
    made = [choice for each, choice in _choices().items() if each not in known]
    return [f"{c.implementation.op.name}: {c.implementation.name} ({c.source})" for c in made]


# What the program itself does: batches, processes, figures.


def _run(task: str, cells: list[Cell], given: argparse.Namespace, until: float) -> subprocess.Popen[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as spec:
        json.dump([cell.json() for cell in cells], spec)
    command = [sys.executable, __file__, *sys.argv[1:], "--task", task, "--spec", spec.name, "--until", str(until)]
    # A pool of compilers in each of several processes would be more than the machine has.
    environment = {"PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "99", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    plain = {name: value for name, value in os.environ.items() if name != "TILEBOOK"}  # what others call is PyTorch's
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**plain, **environment})


def _rows(running: list[subprocess.Popen[str]], until: float) -> Iterator[Row]:
    """What the processes print, once they are done or their time is over."""
    import threading

    lines: list[str] = []
    readers = [threading.Thread(target=lambda p=p: lines.extend(p.stdout or ()), daemon=True) for p in running]
    for reader in readers:
        reader.start()
    for process, reader in zip(running, readers, strict=True):
        try:
            process.wait(max(0.1, until + _GRACE_S - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            print("a process outran its time and was ended", flush=True)
        reader.join(5)
    for line in list(lines):
        if line.startswith("{"):
            yield json.loads(line)
        else:
            print(line, end="", flush=True)


def batch(cells: list[Cell], given: argparse.Namespace, until: float) -> list[Row]:
    """One row a cell that was timed."""
    found: dict[str, Row] = {}
    prepared = time.time() + _PREPARING * (until - time.time())
    workers = max(1, given.workers)
    # What FlexAttention compiles for takes seconds each, and must not keep the others waiting.
    cells = sorted(cells, key=lambda cell: cell.kind in ("forms", "packed"))
    running = [_run("judge", cells[n::workers], given, prepared) for n in range(workers) if cells[n::workers]]
    names = [_run("kernels", cells, given, prepared)]
    for row in _rows([*running, *names], prepared):
        found.setdefault(row["name"], {}).update(row)
    met = [cell for cell in cells if "errors" in found.get(cell.name, {})]
    for row in _rows([_run("clock", met, given, until)], until):
        timed = found.setdefault(row["name"], {})
        timed.update(row)
        timed["timed"] = True
    by_name = {cell.name: cell for cell in cells}
    return [_whole(by_name[name], row) for name, row in found.items() if row.get("timed")]


def _whole(cell: Cell, row: Row) -> Row:
    """A row with what follows from it."""
    row = {"group": cell.group, "source": cell.source, "problem": cell.label, "dtype": cell.dtype, **row}
    found = row.get("errors", {})
    others = [each for name, each in found.items() if name != "tilebook"]
    if "tilebook" in found and others:
        worst = [max(each) for each in zip(*others, strict=True)]
        factor, more = _OVER
        row["right"] = all(mine <= factor * its + more for mine, its in zip(found["tilebook"], worst, strict=True))
    plain, here, ours = row.get("kernels"), row.get("kernels of torch"), row.get("kernels of tilebook")
    if plain is not None and here is not None:
        row["as in a plain process"] = plain == here
    if here is not None:
        row["own"] = here == ours
    return row


def main() -> None:
    given = _arguments().parse_args()
    if given.task:
        cells = [Cell(**each) for each in json.loads(Path(given.spec).read_text())]
        if given.task == "kernels":
            return note_kernels(cells, given.device, given.until)
        if given.without_flash4:
            without_flash4()
        if given.task == "judge":
            return judge(cells, given.device, given.until, given.workers, given.called)
        return clock(cells, given.device, given.until, given)

    if given.tune_a_tenth:
        print("\n".join(tune_a_tenth(chosen(given))))
        return None
    if given.out is None:
        raise SystemExit("--out is missing")
    from figures import report, write

    started = time.time()
    until, cells, rows = started + given.seconds - _ENDING_S, chosen(given), list[Row]()
    print(f"{len(cells)} cells", flush=True)
    for first in range(0, len(cells), given.batch):
        if time.time() + _STARTING_S > until and first:
            break
        rows += batch(cells[first : first + given.batch], given, until)
        write(given.out, rows, len(cells), vars(given))
        print(f"{len(rows)} of {len(cells)} cells after {time.time() - started:.0f} s", flush=True)
    report(rows)
    return None


def _arguments() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path)
    found.add_argument("--seconds", type=float, default=600, help="stops by then with what it has")
    found.add_argument("--classes", help=f"of {', '.join(KINDS)} and drawn; all if not given")
    found.add_argument("--suites", default="models,fa,seeds,varlen")
    found.add_argument("--only", default="", help="cells whose name contains this")
    found.add_argument("--sample", type=int, default=0, help="so many cells of each class; all if 0")
    found.add_argument("--drawn", type=int, default=150, help="problems drawn, of no suite")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--modes", default="graph,eager")
    found.add_argument("--without-flash4", action="store_true", help="as if flash-attn-4 were not installed")
    found.add_argument("--tune-a-tenth", action="store_true", help="only print what tunes a tenth of those drawn")
    found.add_argument("--called", action="store_true", help="tilebook's functions, not PyTorch's with tilebook on")
    found.add_argument("--rounds", type=int, default=11)
    found.add_argument("--batch", type=int, default=120, help="cells that one process times")
    found.add_argument("--workers", type=int, default=6, help="processes that compile and judge a batch")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--tiny", action="store_true", help="the same forms at sizes for a CPU: does the program run?")
    for hidden in ("--task", "--spec"):
        found.add_argument(hidden, help=argparse.SUPPRESS)
    found.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    main()
