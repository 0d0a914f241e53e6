"""Attention in fp32 and tf32, and with head dimensions between powers of two: ours against all that PyTorch has.

    python benchmarks/attention_fp32.py --out benchmarks/results/nvidia-h200/attention_fp32.json [--registry PATH]

Contenders are `compare.py`'s, and `F.scaled_dot_product_attention` as a user calls it: without a log-sum-exp, and in
the backward what autograd makes of it, again and again for one forward. All of a problem are captured as CUDA graphs
over rotated inputs and sampled interleaved; speed-ups are over SDPA. PyTorch is told whether tf32 will do.
With --dry-run it runs small, on the CPU and in Triton's interpreter, where times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # which must stand before any kernel is decorated

import torch
import torch.nn.functional as F
from compare import contenders, save

from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch import Snapshot
from tilebook.op import Op, Problem
from tilebook.tuner.judge.measure import Bench, interleave
from tilebook.tuner.judge.stats import median, speedup

PROBLEMS = (
    *(
        (f"B4,H16,S{s},D64{mask}{tf32}", "fp32")
        for tf32 in ("", ",tf32")
        for mask in ("", ",causal")
        for s in (512, 2048)
    ),
    *((f"B4,H16,S2048,D128,causal{tf32}", "fp32") for tf32 in ("", ",tf32")),
    *((f"B4,H16,S{s},D{d}{mask}", "bf16") for d in (72, 80, 96, 160) for mask in ("", ",causal") for s in (512, 2048)),
)
DRY_PROBLEMS = (("B1,H2,S64,D16,causal", "fp32"), ("B1,H1,S40,D24", "bf16"))


class WallClock:
    """Stands in for `Bench` in a dry run: calls timed by the host's clock."""

    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = [inputs]

    def estimate(self, call: Callable[..., Any]) -> float:
        return self.capture(call, 1.0).sample()

    def capture(self, call: Callable[..., Any], _: float) -> Any:
        class Timed:
            def sample(timed) -> float:  # noqa: N805
                start = time.perf_counter()
                call(*self.inputs[0])
                return (time.perf_counter() - start) * 1e3

        return Timed()


def sdpa(op: Op[Any], causal: bool) -> Callable[..., Any]:
    """PyTorch's function, or its derivative, taking what the op takes. A graph is kept for each set of tensors."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    graphs: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> Any:
        with torch.enable_grad():
            if q.data_ptr() not in graphs:
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                graphs[q.data_ptr()] = forward(*leaves), leaves
            o, leaves = graphs[q.data_ptr()]
            return torch.autograd.grad(o, leaves, do, retain_graph=True)

    return backward if op.direction == "bwd" else forward


def measure(op: Op[Any], problem: Any, snapshot: Snapshot, rounds: int, dry: bool) -> dict[str, Any]:
    running = contenders(op, problem, snapshot)
    calls: dict[str, Callable[..., Any]] = {
        name: lambda *inputs, _i=implementation, _c=config: _i(*inputs, config=_c)
        for name, (implementation, config) in running.items()
    }
    calls["sdpa"] = sdpa(op, problem.causal)
    torch.set_float32_matmul_precision("high" if problem.tf32 else "highest")
    inputs = problem.inputs("cpu" if dry else "cuda", 0)
    bench: Any = WallClock(inputs) if dry else Bench(inputs, snapshot.gpu.l2)
    samplers: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            with nullcontext() if dry else torch.cuda.stream(bench._stream):
                for each in bench.inputs:  # autograd repeats on this stream what ran on it, also in the capture
                    call(*each)
            samplers[name] = bench.capture(call, bench.estimate(call))
        except Exception as broken:
            print(f"  {op.name} {problem.label}: {name}: {type(broken).__name__}: {broken}"[:300], flush=True)
    series = dict(zip(samplers, interleave(list(samplers.values()), rounds, 0), strict=True))
    rows = {}
    for name, samples in series.items():
        ratio = speedup(series["sdpa"], samples)
        rows[name] = {
            "config": dict(running[name][1] or {}) if name in running else {},
            "time_ms": median(samples),
            "tflops": problem.cost().flops / median(samples) / 1e9,
            "speedup_over_sdpa": [ratio.value, ratio.low, ratio.high],
        }
    return {"op": op.name, "problem": problem.label, "dtype": problem.dtype, "candidates": rows}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--registry")
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--only", default="", help="problems whose text has this in it")
    arguments.add_argument("--dry-run", action="store_true", help="small, on the CPU: does the program run to its end?")
    given = arguments.parse_args()
    if given.out is None and not given.dry_run:
        arguments.error("--out is missing")

    gpu = devices.find("H200") if given.dry_run else devices.current()
    snapshot, results = Snapshot(gpu, given.registry), []
    chosen = [each for each in (DRY_PROBLEMS if given.dry_run else PROBLEMS) if given.only in ",".join(each)]
    for text, dtype in chosen:
        for op in (ops.get("attention_fwd"), ops.get("attention_bwd")):
            problem: Problem = op.problem.parse(text, dtype)
            results.append(measure(op, problem, snapshot, given.rounds, given.dry_run))
            times = "  ".join(f"{n} {r['time_ms']:.4g}" for n, r in results[-1]["candidates"].items())
            print(f"{op.name} {text} {dtype}: {times}", flush=True)
    if given.out is None:
        return
    save(given.out, "attention in fp32, tf32 and between powers of two", gpu.name, rounds=given.rounds, results=results)


if __name__ == "__main__":
    with torch.no_grad():
        main()
