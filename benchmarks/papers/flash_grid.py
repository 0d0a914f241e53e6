"""Training steps of GPTs over a grid of lengths, widths and depths: what attention without its matrix of scores saves.

    python benchmarks/papers/flash_grid.py --out benchmarks/results/nvidia-h200/papers/flash_grid.json [--gigabytes 24]
    python benchmarks/papers/flash_grid.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

The study took batches of one, 2,048 to 16,384 tokens, widths of 1,024 to 4,096, 4 to 24 layers on an L4, and saved
68.9 % of the time and 49.5 % of the memory. Here attention is written out ("standard"), PyTorch's ("sdpa") or
tilebook's; bf16 weights, heads of 64, forward and backward, no optimizer. Small configurations come first. A share is
the mean over the configurations in which both fit. With --gigabytes a process may have no more memory than that.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from dataclasses import replace
from typing import Any

import beside
import torch
import torch.nn.functional as F
from attention_memory import eager
from small_models import PYTORCH, Block, Functions, Sizes
from torch import nn
from train_steps import synchronize

import tilebook
from tilebook.report.plots import Panel, draw

STUDY = {"time": 68.9, "memory": 49.5}
"""Percent saved."""

LENGTHS, WIDTHS, LAYERS = (2048, 4096, 8192, 16384), (1024, 2048, 4096), (4, 8, 16, 24)
TINY = (64, 128), (64,), (1, 2)
HEAD = 64

WAYS = {
    "standard": eager,
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "tilebook": lambda q, k, v: tilebook.attention(q, k, v, causal=True),
}
USES = {name: replace(PYTORCH, attention=call) for name, call in WAYS.items()}


class GPT(nn.Module):
    """Layers with their norms first, between an embedding and a head of few words."""

    def __init__(self, s: Sizes, use: Functions) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(s.vocabulary, s.width), nn.Embedding(s.tokens, s.width)
        self.blocks = nn.Sequential(*(Block(s, use, True) for _ in range(s.layers)))
        self.norm, self.head = nn.LayerNorm(s.width), nn.Linear(s.width, s.vocabulary)

    def use(self, functions: Functions) -> None:
        for block in self.blocks:
            block.use = functions

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids) + self.position.weight)))


def step(model: GPT, ids: torch.Tensor) -> None:
    logits = model(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    for each in model.parameters():
        each.grad = None


def timed(model: GPT, ids: torch.Tensor, device: str) -> tuple[float, int]:
    """(ms a step, the most bytes allocated at once, weights included)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(device)
    start = time.perf_counter()
    step(model, ids)
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return (time.perf_counter() - start) * 1e3, peak


def measured(length: int, width: int, layers: int, given: argparse.Namespace) -> dict[str, Any]:
    """ms and bytes of every way that fits, in turns after two steps that do not count."""
    row: dict[str, Any] = {"length": length, "width": width, "layers": layers}
    sizes = Sizes(layers, width, width // HEAD, 4 * width, length, 1, vocabulary=1024)
    series: dict[str, list[tuple[float, int]]] = {}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(given.device):
            model = GPT(sizes, PYTORCH)
    except torch.OutOfMemoryError:
        return row | {"ms": {}, "bytes": {}}
    finally:
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(sizes.vocabulary, (1, length + 1), device=given.device)
    for name, use in USES.items():
        model.use(use)
        try:
            for _ in range(2):
                step(model, ids)
            series[name] = []
        except torch.OutOfMemoryError:
            model.zero_grad(set_to_none=True)
        _freed(given.device)
    order = random.Random(0)
    for _ in range(given.rounds):
        for name in order.sample(list(series), len(series)):
            model.use(USES[name])
            series[name].append(timed(model, ids, given.device))
    row["ms"] = {name: round(statistics.median(ms for ms, _ in each), 3) for name, each in series.items()}
    row["bytes"] = {name: max(peak for _, peak in each) for name, each in series.items()}
    return row


def _freed(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def saved(rows: list[dict[str, Any]], over_way: str) -> dict[str, Any]:
    """Percent of another way's time and memory that tilebook saves: mean, least and most; and who fits where."""
    both = [row for row in rows if {over_way, "tilebook"} <= set(row["ms"])]
    found: dict[str, Any] = {"configurations": len(both)}
    for what, key in (("time", "ms"), ("memory", "bytes")):
        shares = [100 * (1 - row[key]["tilebook"] / row[key][over_way]) for row in both if row[key][over_way]]
        found[what] = [statistics.fmean(shares), min(shares), max(shares)] if shares else None
    fits = [{name for name in ("tilebook", over_way) if name in row["ms"]} for row in rows]
    return found | {"only tilebook fits": fits.count({"tilebook"}), f"only {over_way} fits": fits.count({over_way})}


def shown(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            f"{row['length']} × {row['width']}, layers: {row['layers']}",
            *(row["ms"].get(name) for name in WAYS),
            *(None if name not in row["bytes"] else row["bytes"][name] / 2**30 for name in WAYS),
        ]
        for row in rows
    ]
    head = ["a step: tokens × width", *(f"{name}, ms" for name in WAYS), *(f"{name}, GB" for name in WAYS)]
    shares: list[list[Any]] = [["the study, over standard", STUDY["time"], STUDY["memory"], None, None]]
    for way in ("standard", "sdpa"):
        found = saved(rows, way)
        shares.append(
            [
                f"tilebook over {way}",
                *(found[what] and "{:.1f} ({:.1f} … {:.1f})".format(*found[what]) for what in ("time", "memory")),
                found["configurations"],
                found["only tilebook fits"],
            ]
        )
    means = beside.table(["", "% of time saved", "% of memory saved", "where both fit", "only tilebook fits"], shares)
    return f"{beside.table(head, lines)}\n\n{means}"


def main() -> None:
    parser = beside.arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--gigabytes", type=float, help="as much memory as another GPU has, 24 for an L4")
    given = parser.parse_args()
    if given.gigabytes and given.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, given.gigabytes * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        )
    rows: list[dict[str, Any]] = []
    grid = itertools.product(*(TINY if given.tiny else (LENGTHS, WIDTHS, LAYERS)))
    for length, width, layers in sorted(grid, key=lambda c: c[0] * c[1] * c[2] * (12 * c[1] + c[0])):
        if beside.over(given):
            break
        rows.append(measured(length, width, layers, given))
        _freed(given.device)
        print({name: value for name, value in rows[-1].items() if name != "bytes"}, flush=True)
        shares = {way: saved(rows, way) for way in ("standard", "sdpa")}
        beside.keep(given, "GPTs over a grid", gigabytes=given.gigabytes, study=STUDY, saved=shares, results=rows)
    print(shown(rows))
    widest = max((row["width"] for row in rows), default=0)
    deepest = max((row["layers"] for row in rows if row["width"] == widest), default=0)
    chosen = [row for row in rows if (row["width"], row["layers"]) == (widest, deepest)]
    draw(
        given.out,
        [
            Panel(f"{title}, width {widest}, {deepest} layers", lines=_lines(chosen, key), x="tokens")
            for title, key in (("ms a step", "ms"), ("bytes", "bytes"))
        ],
    )


def _lines(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    found = {name: [(row["length"], row[key][name]) for row in rows if row[key].get(name)] for name in WAYS}
    return {name: tuple(zip(*each, strict=True)) for name, each in found.items() if each}


if __name__ == "__main__":
    main()
