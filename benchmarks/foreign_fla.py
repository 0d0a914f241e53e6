"""flash-linear-attention as its users run it, and with its kernels tuned offline by tilebook. On one or two GPUs.

    python benchmarks/foreign_fla.py --out benchmarks/results/nvidia-h200/foreign_fla.json [--budget 240] [--ranks 2]
    python benchmarks/foreign_fla.py --only simple_gla --budget 60 --out /tmp/tried.json       # a first look

A training step is forward and backward of each op at B8 H16 S2048 D64 in bf16, and of GLA on a pack of ragged lengths;
forward alone where fla refuses its backward pass, as with Triton 3.4 to 3.7.0 on Hopper (`forward_only` in the JSON).
Every program is a process of its own, and all have one compile cache, which is empty at first: *plain*, whose
autotuners search; *again*, the same once more, as every later process of a user; *recorded*; then `tilebook tune
--recorded`; then *served*, in turns with *again*. JSON: seconds of the first step, milliseconds of a steady one, the
configs that ran, by kernel and key, and where two ranks have others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from compare import save

from tilebook import device as devices

BATCH, HEADS, SEQ, WIDTH = 8, 16, 2048, 64
LENGTHS = (1, 37, 64, 65, 500, 1023, 1024, 1500, 2048, 3000, 3122, 4000)
STEPS = 30
TURNS = 3
CHUNK = 64

Step = Callable[[], None]


def rules() -> dict[str, Any]:
    """What inputs are to be where random numbers would not do: decays in log space, and a pack's places."""
    ends, chunks = [0], []
    for number, length in enumerate(LENGTHS):
        ends.append(ends[-1] + length)
        chunks += [[number, chunk] for chunk in range(-(-length // CHUNK))]
    decays = {name: {"uniform": [-0.1, 0.0]} for name in ("g", "gk", "g_cumsum", "A_log")}
    return {"fla.*": {**decays, "cu_seqlens": {"values": ends}, "chunk_indices": {"values": chunks}}}


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]


def stepping(function: Callable[..., Any], tensors: list[torch.Tensor], **options: Any) -> Step:
    """Forward, and backward if gradients are recorded."""
    do = torch.randn_like(tensors[2])

    def step() -> None:
        o = function(*tensors, **options)[0]
        if o.requires_grad:
            torch.autograd.grad(o, tensors, do)

    return step


def forward_only() -> tuple[str, ...]:
    """The ops whose backward pass fla refuses here."""
    found = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
    hopper = torch.cuda.get_device_capability()[0] == 9
    return ("simple_gla", "gated_delta_rule") if hopper and (3, 4, 0) <= found < (3, 7, 1) else ()


def steps(only: list[str]) -> dict[str, Step]:
    """By name; each has inputs of its own."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    torch.manual_seed(0)
    heads, rows = (BATCH, SEQ, HEADS), (BATCH, SEQ, HEADS, WIDTH)
    packed = (1, sum(LENGTHS), HEADS, WIDTH)
    ends = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0)
    sigmoid = torch.nn.functional.logsigmoid

    def simple(q: Any, k: Any, v: Any, g: Any) -> Any:
        return chunk_simple_gla(q, k, v, sigmoid(g.float() + 4))

    def gla(q: Any, k: Any, v: Any, g: Any, **options: Any) -> Any:
        return chunk_gla(q, k, v, sigmoid(g.float() + 4), **options)

    def delta(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        return chunk_gated_delta_rule(q, k, v, sigmoid(g.float() + 4), beta.sigmoid(), use_qk_l2norm_in_kernel=True)

    found = {
        "simple_gla": lambda: stepping(simple, leaves(rows, rows, rows, heads)),
        "gla": lambda: stepping(gla, leaves(rows, rows, rows, rows)),
        "gated_delta_rule": lambda: stepping(delta, leaves(rows, rows, rows, heads, heads)),
        "gla of a pack": lambda: stepping(gla, leaves(*[packed] * 4), cu_seqlens=ends),
    }
    return {name: make() for name, make in found.items() if not only or name in only}


def program(only: list[str]) -> None:
    """What `process` starts: some steps, and what they took, as JSON."""
    ops, alone = steps(only), forward_only()
    torch.cuda.synchronize()
    took: dict[str, list[float]] = {name: [] for name in ops}
    for _ in range(1 + STEPS):
        for name, step in ops.items():
            began = time.perf_counter()
            with torch.set_grad_enabled(name not in alone):
                step()
            torch.cuda.synchronize()
            took[name].append(time.perf_counter() - began)
    steady = {name: 1e3 * statistics.median(times[STEPS // 3 :]) for name, times in took.items()}
    first = {name: times[0] for name, times in took.items()}
    print(json.dumps({"first_s": first, "steady_ms": steady, "configs": configs()}))


def configs() -> dict[str, dict[str, str]]:
    """What the autotuners of fla have settled on, by kernel and key."""
    found: dict[str, dict[str, str]] = {}
    for name, module in list(sys.modules.items()):
        for each in vars(module).values() if name.startswith("fla.") else ():
            while each is not None and not hasattr(each, "configs"):
                each = getattr(each, "fn", None)  # heuristics stand around an autotuner
            if each is not None and getattr(each, "cache", None):
                kernel = getattr(each, "base_fn", each.fn).__name__
                found.setdefault(kernel, {}).update({str(key): str(chosen) for key, chosen in dict(each.cache).items()})
    return found


def process(folder: Path, only: list[str], rank: int = 0, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "TILEBOOK_REGISTRY": str(folder / "registry.db"),
        "CUDA_VISIBLE_DEVICES": str(rank), **variables,
    }  # fmt: skip
    command = [sys.executable, __file__, "--program", "--only", *only]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def told(running: subprocess.Popen[str]) -> dict[str, Any]:
    printed = running.communicate()[0]
    if running.returncode:
        raise SystemExit(f"a program of fla ended with {running.returncode}")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    total = sum(found["steady_ms"].values())
    print(f"first {sum(found['first_s'].values()):.2f} s, steady {total:.2f} ms", found["steady_ms"], flush=True)
    return found


def tuned(folder: Path, budget: float, workers: int | None) -> dict[str, Any]:
    """`tilebook tune --recorded`: how long it took, and its rows."""
    (folder / "rules.json").write_text(json.dumps(rules()))
    command = [
        sys.executable, "-m", "tilebook", "tune", "--recorded", str(folder / "record"), "--rules",
        str(folder / "rules.json"), "--registry", str(folder / "registry.db"), "--budget", f"{budget:.0f}s", "--format",
        "json", *([] if workers is None else ["--workers", str(workers)]),
    ]  # fmt: skip
    began = time.monotonic()
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    rows = json.loads(done.stdout) if done.stdout.strip() else []
    kept = ("op", "problem", "status", "implementation", "config", "time_ms", "speedup", "error")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "status": done.returncode,
        "rows": [{name: row[name] for name in kept if name in row} for row in rows],
    }


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    serve = {"TILEBOOK_TRITON": "serve"}
    found: dict[str, Any] = {"plain": told(process(folder, given.only))}
    found["recorded"] = told(process(folder, given.only, TILEBOOK_TRITON=f"record:{folder / 'record'}"))
    found["tuned"] = tuned(folder, given.budget, given.workers)
    print(f"tuned in {found['tuned']['seconds']} s: {len(found['tuned']['rows'])} verdicts", flush=True)
    found["again"], found["served"] = [], []
    for _ in range(TURNS):
        found["again"].append(told(process(folder, given.only)))
        found["served"].append(told(process(folder, given.only, **serve)))
    ratios = {
        name: [round(a["steady_ms"][name] / b["steady_ms"][name], 4) for a, b in zip(found["again"], found["served"])]  # noqa: B905
        for name in found["plain"]["steady_ms"]
    }
    if given.ranks > 1:
        running = [process(folder, given.only, rank, **serve) for rank in range(given.ranks)]
        of_ranks = [told(each)["configs"] for each in running]
        found["ranks_differ"] = sorted(
            kernel for kernel in of_ranks[0] if any(other.get(kernel) != of_ranks[0][kernel] for other in of_ranks)
        )
    return {"ratios": ratios, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="of simple_gla, gla, gated_delta_rule, 'gla of a pack'")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for `tilebook tune`")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--program", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.program:
        program(given.only)
        return
    if given.out is None:
        parser.error("--out is needed")
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given, Path(folder))
    save(given.out, "fla-core", devices.current().name, budget_s=given.budget, forward_only=forward_only(), **found)
    print(json.dumps(found["ratios"]))


if __name__ == "__main__":
    main()
