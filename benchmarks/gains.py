"""The tables of speed in docs/speed.md and docs/kernels/attention.md, from the figures behind a suite's verdicts.

    python benchmarks/gains.py benchmarks/results/nvidia-h200/fa.json

The yardstick is `cudnn`: what `F.scaled_dot_product_attention` runs on Hopper from PyTorch 2.11 on. `torch` is
FlashAttention-2 in these figures: what it ran there before, and still runs on sm_80, sm_86, sm_89 and sm_120.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

_EXTERNAL = "flash_attention_4"
_LENGTHS = (512, 2048, 8192, 16384)
_COLUMNS = ("cudnn", "torch", "default", "tuned", _EXTERNAL)

Row = dict[str, Any]
Group = tuple[str, str, str]  # pass, head dimension, mask


def group_of(row: Row) -> Group:
    fields = row["problem"].split(",")
    head_dim = next(field for field in fields if field.startswith("D"))
    return row["op"].removeprefix("attention_"), head_dim, "causal" if "causal" in fields else "full"


def length_of(row: Row) -> int:
    return next(int(field[1:]) for field in row["problem"].split(",") if field.startswith("S"))


def grouped(rows: list[Row]) -> dict[Group, list[Row]]:
    groups: dict[Group, list[Row]] = {}
    for row in sorted(rows, key=length_of):
        groups.setdefault(group_of(row), []).append(row)
    return groups


def over_cudnn(row: Row) -> dict[str, float]:
    """How many times as fast as cuDNN: what dispatch serves with flash-attn-4 and without, and our kernels alone."""
    times = row["times_ms"]
    # Without the package dispatch serves the next of the verdict's ranking, which is the fastest of the rest.
    rest = min(ms for name, ms in times.items() if name not in (_EXTERNAL, "dispatched"))
    served = {"installed": times["dispatched"], "absent": rest, "ours": times["tuned"]}
    return {name: times["cudnn"] / ms for name, ms in served.items()}


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: list[Row]) -> list[str]:
    """Cells of geometric means over cuDNN, the worst in brackets, and where the worst of our kernels is."""
    gains = [over_cudnn(row) for row in rows]
    cells = []
    for name in ("installed", "absent", "ours"):
        values = [gain[name] for gain in gains]
        cells.append(f"{mean(values):.2f} ({min(values):.2f})")
    worst = min(range(len(rows)), key=lambda index: gains[index]["ours"])
    older = mean([row["times_ms"]["torch"] / row["times_ms"]["dispatched"] for row in rows])
    return [*cells, f"S{length_of(rows[worst])}", f"{older:.2f}"]


def gains_table(rows: list[Row]) -> list[str]:
    """One line a group of problems, the groups where our kernels do worst first."""
    lines = [
        "| over cuDNN: mean (worst) | with flash-attn-4 | without | our kernels alone | worst at | over FlashAttn-2 |",
        "|---|---|---|---|---|---|",
    ]
    names = {"fwd": "forward", "bwd": "backward"}
    groups = grouped(rows).items()
    for (direction, head_dim, mask), members in sorted(groups, key=lambda g: min(over_cudnn(r)["ours"] for r in g[1])):
        lines.append(f"| {names[direction]} {head_dim} {mask} | {' | '.join(summary(members))} |")
    for direction, name in names.items():
        members = [row for row in rows if group_of(row)[0] == direction]
        *cells, _, older = summary(members)
        lines.append(f"| **{name}**, all {len(members)} | {' | '.join([*cells, '', older])} |".replace("|  |", "| |"))
    return lines


def rates_table(rows: list[Row], direction: str) -> list[str]:
    """TFLOP/s at four lengths; "–" where a candidate was not asked."""
    name = {"fwd": "forward", "bwd": "backward"}[direction]
    lengths = " / ".join(str(length) for length in _LENGTHS)
    lines = [
        f"| {name}, TFLOP/s at {lengths} | cuDNN | FlashAttention-2 | ours, default | ours, tuned | flash-attn-4 |",
        "|---|---|---|---|---|---|",
    ]
    for (its, head_dim, mask), members in sorted(grouped(rows).items()):
        if its == direction:
            by_length = {length_of(row): row["tflops"] for row in members}
            cells = [
                " / ".join(f"{by_length[n][c]:.0f}" if c in by_length[n] else "–" for n in _LENGTHS) for c in _COLUMNS
            ]
            lines.append(f"| {head_dim} {mask} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("figures", type=Path)
    rows = json.loads(arguments.parse_args().figures.read_text())["results"]
    for table in (gains_table(rows), rates_table(rows, "fwd"), rates_table(rows, "bwd")):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
