"""The figures of `never_slower.py`: what it writes, and the table that it prints, worst first."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compare import save

from tilebook import device as devices

Row = dict[str, Any]

SHORT_MS = 0.05
"""An eager call shorter than this is one whose time is mostly the host's."""

_SHOWN = 25


def classes(rows: list[Row], mode: str) -> dict[str, Row]:
    """Of each class of calls: the geometric mean of the ratios, the worst, and how many are below some bounds."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if mode in row:
            name = row["group"]
            if mode == "eager":
                short = row[mode]["ms"][row[mode]["yardstick"]] < SHORT_MS
                grouped.setdefault("all, below 50 µs" if short else "all, from 50 µs", []).append(row)
            grouped.setdefault(name, []).append(row)
    return {name: _summary(members, mode) for name, members in sorted(grouped.items())}


def _summary(rows: list[Row], mode: str) -> Row:
    values = [row[mode]["ratio"][1] for row in rows]
    noise = [abs(math.log(row[mode]["noise"][1])) for row in rows]
    worst = min(range(len(rows)), key=lambda n: values[n])
    return {
        "cells": len(rows),
        "mean": round(math.exp(math.fsum(map(math.log, values)) / len(values)), 4),
        "worst": values[worst],
        "worst_at": rows[worst]["name"],
        "below_0.99": sum(value < 0.99 for value in values),
        "below_0.97": sum(value < 0.97 for value in values),
        "own": sum(bool(row.get("own")) for row in rows),
        "noise": round(math.exp(max(noise)), 4),
    }


def write(out: Path, rows: list[Row], asked: int, arguments: Row) -> None:
    """The whole document; written after every batch, so that nothing measured is lost."""
    on_gpu = arguments["device"] == "cuda"
    save(
        out,
        "never slower",
        devices.current().name if on_gpu else "cpu",
        arguments={name: str(value) for name, value in arguments.items() if value is not None},
        flash_attn_4=devices.package_version("flash-attn-4"),
        asked=asked,
        measured=len(rows),
        failed=[row["name"] for row in rows if "failed" in row],
        wrong=[row["name"] for row in rows if row.get("right") is False],
        kernels_differ=[row["name"] for row in rows if row.get("as in a plain process") is False],
        classes={mode: classes(rows, mode) for mode in ("graph", "eager")},
        results=rows,
    )


def report(rows: list[Row]) -> None:
    for mode in ("graph", "eager"):
        timed = sorted((row for row in rows if mode in row), key=lambda row: row[mode]["ratio"][1])
        print(f"\n{mode}: the slowest of {len(timed)} cells")
        for row in timed[:_SHOWN]:
            figures = row[mode]
            low, middle, high = figures["ratio"]
            times = figures["ms"]
            own = "PyTorch's own" if row.get("own") else "; ".join(row.get("served", ()))
            print(
                f"  {middle:.3f} ({low:.3f} … {high:.3f}; noise {figures['noise'][1]:.3f})  {row['name']}: "
                f"{times[figures['yardstick']]:.4f} ms {figures['yardstick']}, {times['tilebook']:.4f} tilebook  {own}"
            )
        print(f"{mode:36}{'cells':>6}{'mean':>8}{'worst':>8}{'<0.99':>7}{'<0.97':>7}{'own':>5}{'noise':>7}  worst at")
        for name, found in classes(rows, mode).items():
            print(
                f"{name:36}{found['cells']:6}{found['mean']:8.3f}{found['worst']:8.3f}{found['below_0.99']:7}"
                f"{found['below_0.97']:7}{found['own']:5}{found['noise']:7.3f}  {found['worst_at']}"
            )
    for what, names in (
        ("failed", [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]),
        ("wrong", [f"{row['name']}: {row['errors']}" for row in rows if row.get("right") is False]),
        ("other kernels than in a plain process", [r["name"] for r in rows if r.get("as in a plain process") is False]),
    ):
        print(f"{what}: {len(names)}", *[f"  {name}" for name in names[:_SHOWN]], sep="\n")
