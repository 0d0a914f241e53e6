"""An MLP as model code calls it: tilebook.mlp against torch.nn.Linear + GELU + torch.nn.Linear, forward and training.

    python benchmarks/mlp_module.py --out benchmarks/results/nvidia-h200/mlp_module.json

Alternating between the two: as eager calls, host cost included, and replayed from a CUDA graph, the GPU's time alone;
and what the forward keeps for the backward, in bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import save

import tilebook
from tilebook import device as devices
from tilebook.tuner.judge.stats import median, speedup

SHAPES = {"CCT-14": (1568, 384, 1152), "DistilBERT": (4096, 768, 3072)}


def eager(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def sample(call: Callable[[], Any], launches: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / launches


def graphed(call: Callable[[], Any], calls: int = 10) -> Callable[[], Any]:
    """Replays `calls` calls captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return graph.replay


def race(calls: dict[str, Callable[[], Any]], rounds: int, launches: int, each: int) -> dict[str, Any]:
    """ms a call of each, alternating, and the speed-up of tilebook with its interval; `each` calls make one launch."""
    series: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        sample(call, 5)
    for _ in range(rounds):
        for name, call in calls.items():
            series[name].append(sample(call, launches) / each)
    ratio = speedup(series["eager"], series["tilebook"])
    times = {f"{name}_ms": median(samples) for name, samples in series.items()}
    return {**times, "speedup": [ratio.value, ratio.low, ratio.high]}


def kept(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> int:
    """Bytes that live on after the forward beside its output: what is saved for the backward."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = function(*inputs)
    return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()


def measure(m: int, h: int, i: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, device="cuda", generator=generator) * scale
        return values.bfloat16().requires_grad_()

    inputs = [random(m, h), random(i, h, scale=h**-0.5), random(i), random(h, i, scale=i**-0.5), random(h)]
    dy = random(m, h).detach()

    def train(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*inputs), inputs, dy)

    def infer(function: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return call

    rows: dict[str, Any] = {}
    for what, make in {"forward": infer, "forward+backward": train}.items():
        calls = {"eager": make(eager), "tilebook": make(tilebook.mlp)}
        rows[what] = {
            "eager calls": race(calls, rounds, 20, 1),
            "CUDA graph": race({name: graphed(call) for name, call in calls.items()}, rounds, 5, 10),
        }
    memory = {"eager_bytes": kept(eager, inputs), "tilebook_bytes": kept(tilebook.mlp, inputs)}
    rows["kept for backward"] = {**memory, "saved": 1 - memory["tilebook_bytes"] / memory["eager_bytes"]}
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=30)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()
    results = {name: measure(*shape, given.rounds) for name, shape in SHAPES.items()}
    save(given.out, "mlp module", devices.current().name, results=results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
