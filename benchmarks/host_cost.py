"""What one call costs the host, in µs: tilebook's functions beside PyTorch's, at shapes too small to keep a GPU busy.

python benchmarks/host_cost.py --out benchmarks/results/nvidia-h200/host_cost.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import save

import tilebook
from tilebook import device as devices

TURNS = 15


def cost_us(call: Callable[[], Any], calls: int) -> float:
    """Host time of one asynchronous call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / calls * 1e6


def compare(theirs: Callable[[], Any], ours: Callable[[], Any], calls: int) -> dict[str, Any]:
    """In turns, so that what else the machine does meets both alike: medians, and quartiles of the ratio of a turn."""
    turns = [(cost_us(theirs, calls), cost_us(ours, calls)) for _ in range(TURNS + 1)][1:]
    ratios = statistics.quantiles([mine / other for other, mine in turns], n=4)
    other, mine = (round(statistics.median(each), 1) for each in zip(*turns, strict=True))
    return {"pytorch": other, "tilebook": mine, "ratio": [round(ratio, 2) for ratio in ratios]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    tiny, cct = ([random(*shape) for _ in range(3)] for shape in ((1, 2, 64, 64), (8, 6, 196, 64)))
    mlp = [random(32, 64), random(128, 64), random(128), random(64, 128), random(64)]
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]] = {
        "attention B1,H2,S64,D64": (F.scaled_dot_product_attention, tilebook.attention, tiny),
        "attention B8,H6,S196,D64": (F.scaled_dot_product_attention, tilebook.attention, cct),
        "mlp M32,H64,I128": (
            lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
            tilebook.mlp,
            mlp,
        ),
    }
    cache = random(4, 2, 1, 64), random(4, 2, 128, 64), random(4, 2, 128, 64)
    norm = [random(64, 512), random(512)]
    calls |= {
        "drop-in B1,H2,S64,D64": (F.scaled_dot_product_attention, tilebook.scaled_dot_product_attention, tiny),
        "attention B4,H8,S2048,D64": (
            F.scaled_dot_product_attention,
            tilebook.attention,
            [random(4, 8, 2048, 64) for _ in range(3)],
        ),
        "rms_norm M64,N512": (lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), tilebook.rms_norm, norm),
        "decode B4,H2,S1,Sk128,D64": (F.scaled_dot_product_attention, tilebook.attention_decode, list(cache)),
    }
    results: dict[str, Any] = {}
    for name, (theirs, ours, inputs) in calls.items():
        leaves = [x.clone().requires_grad_() for x in inputs]
        dy = torch.randn_like(theirs(*inputs))

        def step(function: Callable[..., Any], a: list[torch.Tensor] = leaves, g: torch.Tensor = dy) -> Any:
            return lambda: torch.autograd.grad(function(*a), a, g)

        with torch.no_grad():
            forward = compare(lambda f=theirs, a=inputs: f(*a), lambda f=ours, a=inputs: f(*a), 200)
        results[name] = {"forward": forward}
        if ours is not tilebook.attention_decode:
            results[name]["forward+backward"] = compare(step(theirs), step(ours), 100)
        print(name, results[name], flush=True)
    save(given.out, "host cost, microseconds a call", devices.current().name, results=results)


if __name__ == "__main__":
    main()
