"""PyTorch's `varlen_attn` for packed sequences, plain and with tilebook enabled: milliseconds, in turns in one process.

    python benchmarks/varlen_attn.py --out benchmarks/results/nvidia-h200/varlen_attn.json
    python benchmarks/varlen_attn.py --device cpu --tiny --out /tmp/tried.json      # no GPU: makes its packs, and ends

16,384 tokens in sequences of 64 … `longest`, drawn by a seed, bf16; forward, and forward with gradients. Plain takes
part twice: the ratio of the two is the noise. `kernels` names what ran with tilebook. Of small packs, which the host
bounds, times are the host's, microseconds of a call.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare import arguments, save
from noted_masks import timed

import tilebook
from tilebook import device as devices

TOKENS, SMALL_CALLS = 16384, 2000
HEADS = (32, 64), (16, 128)
CASES = [(*each, causal, longest) for longest in (2048, 8192) for each in HEADS for causal in (True, False)]
WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "plain": nullcontext, "tilebook": tilebook.enabled, "plain again": nullcontext,
}  # fmt: skip


def lengths(total: int, longest: int) -> list[int]:
    source, found = random.Random(longest), list[int]()
    while sum(found) < total:
        found.append(min(source.randint(min(64, longest), longest), total - sum(found)))
    return found


def packed(found: list[int], heads: int, width: int, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v (T, H, D), and where sequences end."""
    ends = torch.tensor([0, *itertools.accumulate(found)], dtype=torch.int32, device=device)
    return [torch.randn(sum(found), heads, width, device=device, dtype=torch.bfloat16) for _ in range(3)], ends


def microseconds(run: Callable[[], Any]) -> float:
    """Of the host."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(SMALL_CALLS):
        run()
    ended = time.perf_counter()
    torch.cuda.synchronize()
    return (ended - began) / SMALL_CALLS * 1e6


def kernels(run: Callable[[], Any]) -> list[str]:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sorted({each.key[:80] for each in profile.key_averages() if each.device_time_total})


def turns(run: Callable[[], Any], clock: Callable[[Callable[[], Any]], float], rounds: int) -> dict[str, Any]:
    plain = run()
    with tilebook.enabled():
        for _ in range(4):
            ours = run()
        named = kernels(run)
    apart = max((a.float() - b.float()).abs().max().item() for a, b in zip(plain, ours, strict=True))
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, inside in WAYS.items():
            with inside():
                times[way].append(clock(run))
    ratios = sorted(a / b for a, b in zip(times["plain"], times["tilebook"], strict=True))
    noise = statistics.median(a / b for a, b in zip(times["plain"], times["plain again"], strict=True))
    return {
        "times": {way: statistics.median(each) for way, each in times.items()},
        "ratio": [ratios[len(ratios) // 4], statistics.median(ratios), ratios[3 * len(ratios) // 4]],
        "noise": noise,
        "apart": apart,
        "kernels": named,
    }


def measured(case: tuple[int, int, bool, int], total: int, rounds: int) -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn

    heads, width, causal, longest = case
    found = lengths(total, longest)
    (q, k, v), ends = packed(found, heads, width, "cuda")
    leaves, do, most = [x.requires_grad_() for x in (q, k, v)], torch.randn_like(q), max(found)
    window = (-1, 0) if causal else (-1, -1)

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (varlen_attn(q, k, v, ends, ends, most, most, window_size=window),)

    def both() -> tuple[torch.Tensor, ...]:
        o = varlen_attn(q, k, v, ends, ends, most, most, window_size=window)
        return o, *torch.autograd.grad(o, leaves, do)

    row = {"heads": heads, "width": width, "causal": causal, "longest": longest, "sequences": len(found)}
    clock = partial(timed, device="cuda") if total == TOKENS else microseconds
    return {**row, "tokens": total, "forward": turns(forward, clock, rounds), "both": turns(both, clock, rounds)}


def main() -> None:
    given = arguments(__doc__, rounds=9).parse_args()
    rows: list[dict[str, Any]] = []
    began, device = time.time(), devices.current().name if given.device == "cuda" else "cpu"
    for case, total in [*((case, TOKENS) for case in CASES), ((2, 64, False, 40), 64)]:
        if time.time() - began > given.seconds:
            break
        if given.device == "cpu":  # which has no such kernel
            packed(lengths(64, 16), 2, 16, "cpu")
            continue
        rows.append(row := measured(case, total, given.rounds))
        shown = [f"{name} {row[name]['ratio'][1]:.3f} (noise {row[name]['noise']:.3f})" for name in ("forward", "both")]
        print(f"H{case[0]} D{case[1]}, causal {case[2]}, up to {case[3]}: {', '.join(shown)}", flush=True)
        save(Path(given.out), "varlen_attn, milliseconds; of 64 tokens the host's microseconds", device, rows=rows)
    if given.device == "cpu":
        save(Path(given.out), "varlen_attn: the program runs", device, rows=rows)


if __name__ == "__main__":
    main()
