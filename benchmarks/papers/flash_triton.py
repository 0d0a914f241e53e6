"""Attention forward, backward and both over the length of the sequence: ours, PyTorch's fused, and written out.

    python benchmarks/papers/flash_triton.py --out benchmarks/results/nvidia-h200/papers/flash_triton.json
    python benchmarks/papers/flash_triton.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

The study wrote FlashAttention-2 in Triton, forward and backward, and drew both over the length beside PyTorch's
attention: forward well ahead, backward level. Here: 16,384 tokens, hidden size 2048, bf16, eager calls in turns; who
does not fit into memory is left out. TFLOP/s count 4 · B · H · S² · D forward, half of it under a causal mask, and 2.5
times as much backward. What torch.profiler says of one call is its time on the CPU, its time on the GPU and the kernel
that takes most of it.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import beside
import torch
import torch.nn.functional as F
from attention_memory import eager
from faults import written_out
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_steps import synchronize

import tilebook
from tilebook.report.plots import Panel, draw

LENGTHS, HEADS = (512, 1024, 2048, 4096, 8192, 16384), (64, 128)
TINY_LENGTHS, TINY_HEADS = (32, 64), (16,)
BLOCK_MS = 20.0
PROFILED = 5

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def contenders(causal: bool) -> dict[str, Call]:
    return {
        "written out": eager if causal else written_out,
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        "tilebook": lambda q, k, v: tilebook.attention(q, k, v, causal=causal),
    }


def directions(call: Call, inputs: list[torch.Tensor], do: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed: without gradients, gradients of one result, and a whole step."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    o = call(*leaves)
    return {
        "forward": lambda: call(*inputs),
        "backward": lambda: torch.autograd.grad(o, leaves, do, retain_graph=True),
        "both": lambda: torch.autograd.grad(call(*leaves), leaves, do),
    }


def fitting(
    calls: dict[str, Call], inputs: list[torch.Tensor], do: torch.Tensor, device: str
) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is timed of those that fit, each called a few times."""
    found = {}
    for name, call in calls.items():
        try:
            made = directions(call, inputs, do)
            for run in made.values():
                sample(run, 3, device)
            found[name] = made
        except torch.OutOfMemoryError:
            print(f"{name} does not fit: {tuple(do.shape)}")
        made = {}
    return found


def sample(run: Callable[[], Any], calls: int, device: str) -> float:
    """ms a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3 / calls


def profiled(run: Callable[[], Any], device: str) -> dict[str, Any]:
    """ms of one call on the CPU and on the GPU, and what takes most of it there."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        for _ in range(PROFILED):
            run()
        synchronize(device)
    events = seen.key_averages()
    kernels = [each for each in events if each.device_type == DeviceType.CUDA]
    longest = max(kernels, key=lambda each: each.self_device_time_total, default=None)
    waiting = sum(each.self_cpu_time_total for each in events if "Synchronize" in each.key)
    return {
        "cpu_ms": (sum(each.self_cpu_time_total for each in events) - waiting) / PROFILED / 1e3,
        "gpu_ms": sum(each.self_device_time_total for each in kernels) / PROFILED / 1e3,
        "longest": longest and longest.key,
    }


def measured(length: int, head: int, causal: bool, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each direction."""
    tokens, width = (64, 32) if given.tiny else (16384, 2048)
    shape = tokens // length, width // head, length, head
    source = torch.Generator(given.device).manual_seed(0)
    *inputs, do = (torch.randn(shape, generator=source, device=given.device, dtype=torch.bfloat16) for _ in range(4))
    runs = fitting(contenders(causal), inputs, do, given.device)
    rows = []
    for direction, part in (("forward", 1.0), ("backward", 2.5), ("both", 3.5)):
        each = {name: found[direction] for name, found in runs.items()}
        slowest = max(sample(run, 1, given.device) for run in each.values())
        calls = max(1, math.ceil(BLOCK_MS / slowest)) if given.device == "cuda" else 1
        series: dict[str, list[float]] = {name: [] for name in each}
        order = random.Random(0)
        for _ in range(given.rounds):
            for name in order.sample(list(series), len(series)):
                series[name].append(sample(each[name], calls, given.device))
        flops = part * 4 * math.prod(shape) * length / (2 if causal else 1)
        ms = {name: statistics.median(samples) for name, samples in series.items()}
        rows.append(
            {
                "direction": direction,
                "length": length,
                "head": head,
                "causal": causal,
                "ms": ms,
                "tflops": {name: flops / each / 1e9 for name, each in ms.items()},
                "profile": {name: profiled(run, given.device) for name, run in each.items()},
            }
        )
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    names = list(contenders(False))
    head = [
        "",
        "S",
        *(f"{name}, ms" for name in names),
        *(f"{name}, TFLOP/s" for name in names),
        "sdpa's time over tilebook's",
    ]
    lines = [
        [
            _group(row),
            row["length"],
            *(row["ms"].get(name) for name in names),
            *(row["tflops"].get(name) for name in names),
            row["ms"]["sdpa"] / row["ms"]["tilebook"],
        ]
        for row in rows
    ]
    study = [["the study, over PyTorch's", None, *[None] * 6, "forward well ahead, backward level"]]
    seen = [
        [_group(row), row["length"], name, each["cpu_ms"], each["gpu_ms"], each["longest"] and each["longest"][:60]]
        for row in rows
        for name, each in row["profile"].items()
    ]
    profiles = beside.table(["torch.profiler", "S", "", "CPU, ms", "GPU, ms", "longest kernel"], seen)
    return f"{beside.table(head, study + lines)}\n\n{profiles}"


def _group(row: dict[str, Any]) -> str:
    return f"{row['direction']} D{row['head']} {'causal' if row['causal'] else 'full'}"


def panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """TFLOP/s over the length, of each direction with the widest heads under a causal mask."""
    widest, found = max(row["head"] for row in rows), []
    for direction in ("forward", "backward", "both"):
        chosen = [row for row in rows if (row["direction"], row["head"], row["causal"]) == (direction, widest, True)]
        lines = {}
        for name in contenders(True):
            points = [(row["length"], row["tflops"][name]) for row in chosen if name in row["tflops"]]
            lines[name] = ([x for x, _ in points], [y for _, y in points])
        found.append(Panel(f"{direction} D{widest} causal: TFLOP/s", lines=lines, x="tokens"))
    return found


def main() -> None:
    given = beside.arguments(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    for head in TINY_HEADS if given.tiny else HEADS:
        for causal in (True, False):
            for length in TINY_LENGTHS if given.tiny else LENGTHS:
                if beside.over(given):
                    break
                found = beside.attempt(lambda at=(length, head, causal): {"rows": measured(*at, given)})
                if "failed" in found:
                    print(f"S{length} D{head}: {found['failed']}")
                rows += found.get("rows", [])
                beside.keep(given, "attention over the length", results=rows)
    print(shown(rows))
    if rows:
        draw(given.out, panels(rows))


if __name__ == "__main__":
    main()
