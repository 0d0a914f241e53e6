"""What one call costs the host, in µs: tilebook's functions beside PyTorch's, at shapes too small to keep a GPU busy.

python benchmarks/host_cost.py --out benchmarks/results/nvidia-h200/host_cost.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import commit

import tilebook
from tilebook import device as devices


def cost_us(call: Callable[[], Any], calls: int = 200, repeats: int = 7) -> float:
    """Median over repeats of the host time of one asynchronous call."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return statistics.median(found[1:])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    q, k, v = (random(1, 2, 64, 64) for _ in range(3))
    mlp = [random(32, 64), random(128, 64), random(128), random(64, 128), random(64)]
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]] = {
        "attention": (F.scaled_dot_product_attention, tilebook.attention, [q, k, v]),
        "mlp": (lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2), tilebook.mlp, mlp),
    }
    results: dict[str, Any] = {}
    for name, (theirs, ours, inputs) in calls.items():
        leaves = [x.clone().requires_grad_() for x in inputs]
        dy = theirs(*inputs)
        row = {}
        for who, function in (("pytorch", theirs), ("tilebook", ours)):
            with torch.no_grad():
                row[f"{who} forward"] = cost_us(lambda f=function, a=inputs: f(*a))
            row[f"{who} forward+backward"] = cost_us(
                lambda f=function, a=leaves, g=dy: torch.autograd.grad(f(*a), a, g), calls=100
            )
        results[name] = row
        print(name, {key: round(value, 1) for key, value in row.items()}, flush=True)
    document = {
        "benchmark": "host cost, microseconds a call",
        "device": devices.current().name,
        "environment": dict(devices.environment()),
        "commit": commit(),
        "results": results,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
