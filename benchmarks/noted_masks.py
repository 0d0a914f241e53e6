"""Attention under transformers' masks: PyTorch reading the mask, and what the note on it has computed instead.

    python benchmarks/noted_masks.py --out benchmarks/results/nvidia-h200/noted_masks.json
    python benchmarks/noted_masks.py --ours --out …     # our kernels whoever would serve, at any size
    python benchmarks/noted_masks.py --dry-run --out /tmp/tried.json      # on the CPU: does the program run to its end?

Milliseconds of a call, forward and with gradients, by GPU events around several calls; both alternate in one process,
and the median of the turns stands. `served`: was the structure computed, or the mask read? In training the pace of a
program decides about middle sizes, and there is none here: then PyTorch serves, but with --ours. Lengths of padded rows
lie between a quarter of the longest and all of it; packs are eight to a row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import save

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.kernels.attention import structure

SHAPES = [
    ("padded", 64, 12, 512, 64), ("padded", 16, 12, 256, 64), ("padded", 8, 16, 2048, 64),
    ("causal padded", 4, 32, 2048, 64), ("causal padded", 8, 16, 1024, 128), ("causal padded", 2, 32, 4096, 128),
    ("window", 4, 32, 2048, 128), ("window", 1, 32, 8192, 128), ("window padded", 4, 32, 4096, 128),
    ("packed", 1, 32, 4096, 64), ("packed", 1, 32, 8192, 128), ("packed", 4, 12, 2048, 64), ("packed", 8, 12, 1024, 64),
]  # fmt: skip
TURNS, CALLS = 15, 10
PLAIN: Any = torch._C._nn.scaled_dot_product_attention


def made(kind: str, batch: int, n: int, device: str) -> torch.Tensor:
    """The mask that transformers makes, with its note."""
    from transformers import AutoConfig, masking_utils

    config: Any = AutoConfig.for_model("llama", sliding_window=max(2, n // 8))
    config._attn_implementation = "sdpa"
    lengths = torch.linspace(n // 4, n, batch, device=device).long()[:, None]
    keep = (torch.arange(n, device=device) < lengths).long() if "padded" in kind else None
    x = torch.empty(batch, n, 1, device=device)
    if kind == "padded":
        return masking_utils.create_bidirectional_mask(config, x, keep)  # type: ignore[no-any-return]
    if "window" in kind:
        return masking_utils.create_sliding_window_causal_mask(config, x, keep, None)  # type: ignore[no-any-return]
    positions = (torch.arange(n, device=device) % (n // 8)).expand(batch, n) if kind == "packed" else None
    return masking_utils.create_causal_mask(config, x, keep, None, position_ids=positions)  # type: ignore[no-any-return]


def timed(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of a call."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(CALLS):
        run()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / CALLS


def compared(kind: str, batch: int, heads: int, n: int, width: int, device: str, turns: int) -> dict[str, Any]:
    noted = made(kind, batch, n, device)
    q, k, v = (
        torch.randn(batch, n, heads, width, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    row: dict[str, Any] = {"kind": kind, "shape": f"B{batch},H{heads},S{n},D{width}"}
    for training in (False, True):

        def run(mask: torch.Tensor, training: bool = training) -> None:
            with torch.set_grad_enabled(training):
                function = F.scaled_dot_product_attention if mask is noted else PLAIN
                o = function(q, k, v, mask)
                if training:
                    torch.autograd.grad(o, (q, k, v), o.detach())

        masks, times = {"mask": noted.clone(), "note": noted}, dict[str, list[float]](mask=[], note=[])
        for mask in masks.values():
            for _ in range(4 if device == "cuda" else 1):
                run(mask)
        for _ in range(turns):
            for name, mask in masks.items():
                times[name].append(timed(lambda mask=mask: run(mask), device))  # type: ignore[misc]
        row["training" if training else "forward"] = {name: statistics.median(each) for name, each in times.items()}
    with torch.no_grad():
        found = structure.by_note(q, k, v, noted, None, False, F.scaled_dot_product_attention)
    row["served"] = "mask" if found is None else "note"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--ours", action="store_true", help="has our kernels serve")
    told = parser.parse_args()
    device = "cpu" if told.dry_run else "cuda"
    rows = []
    name = "torch" if told.dry_run else "triton" if told.ours else ""
    with tilebook.enabled(), dispatch.use(name) if name else nullcontext():
        for kind, batch, heads, n, width in SHAPES:
            shape = (2, 2, 32, 32) if told.dry_run else (batch, heads, n, width)
            row = compared(kind, *shape, device, 2 if told.dry_run else TURNS)
            rows.append(row)
            print(row, flush=True)
    gpu = "cpu" if told.dry_run else devices.current().name
    save(told.out, "attention under noted masks, milliseconds", gpu, ours=told.ours, rows=rows)


if __name__ == "__main__":
    main()
