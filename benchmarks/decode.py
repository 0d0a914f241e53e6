"""Decoding on this GPU: what share of the bandwidth of a copy our kernel reaches, beside what PyTorch offers.

    python benchmarks/decode.py --out benchmarks/results/nvidia-h200/decode.json [--registry PATH] [--only paged16]

Contenders are `compare.py`'s, and `F.scaled_dot_product_attention` as a user calls it, with `enable_gqa` and without a
log-sum-exp. All of a problem and a copy of 2 GiB are captured as CUDA graphs and sampled interleaved. GB/s count what
must be read at least, every key and value once; a copy's count what it reads and what it writes. Speed-ups are over
SDPA, or where it cannot compute the problem, over eager PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import contenders, save

from tilebook import device as devices
from tilebook import op as ops
from tilebook.dispatch import Snapshot
from tilebook.kernels.decode.problem import DecodeProblem
from tilebook.tuner.judge.measure import Bench, Sampler, interleave
from tilebook.tuner.judge.stats import median, speedup

COPY_BYTES = 1 << 31


def copy_sampler() -> Sampler:
    source, target = (torch.zeros(COPY_BYTES // 4, dtype=torch.int32, device="cuda") for _ in range(2))

    # By a kernel: in a CUDA graph `copy_` becomes a transfer by the copy engines, which are slower.
    def copy(x: torch.Tensor, y: torch.Tensor) -> None:
        torch.add(x, 1, out=y)

    copy(source, target)
    return Bench((source, target), 0).capture(copy, 1.0)


def plain_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def measure(problem: DecodeProblem, snapshot: Snapshot, copy: Sampler, rounds: int) -> dict[str, Any]:
    op = ops.get("attention_decode")
    running = contenders(op, problem, snapshot)
    calls: dict[str, Callable[..., Any]] = {
        name: lambda *inputs, _i=implementation, _c=config: _i(*inputs, config=_c)
        for name, (implementation, config) in running.items()
    }
    if op.implementations["flash"].supports(problem) and not problem.causal:
        calls["sdpa"] = plain_sdpa
    bench = Bench(problem.inputs("cuda", 0), snapshot.gpu.l2)
    samplers = {"copy": copy}
    for name, call in calls.items():
        try:
            call(*bench.inputs[0])
            samplers[name] = bench.capture(call, bench.estimate(call))
        except Exception as broken:
            print(f"  {problem.label}: {name}: {type(broken).__name__}: {broken}"[:300], flush=True)
    series = dict(zip(samplers, interleave(list(samplers.values()), rounds, 0), strict=True))
    copied_gbps = 2 * COPY_BYTES / median(series.pop("copy")) / 1e6
    pytorch = series["sdpa" if "sdpa" in series else "torch"]
    rows = {}
    for name, samples in series.items():
        middle = median(samples)
        gbps = problem.cost().bytes / middle / 1e6
        implementation, config = running.get(name, (None, None))
        ratio = speedup(pytorch, samples)
        rows[name] = {
            "implementation": implementation.name if implementation else "sdpa",
            "config": dict(config or {}),
            "time_ms": middle,
            "spread": (max(samples) - min(samples)) / middle,
            "gbps": gbps,
            "share_of_copy": gbps / copied_gbps,
            "speedup_over_pytorch": [ratio.value, ratio.low, ratio.high],
        }
    return {"problem": problem.label, "dtype": problem.dtype, "copy_gbps": copied_gbps, "candidates": rows}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--registry")
    arguments.add_argument("--only", default="", help="problems whose label contains this")
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--out", type=Path, required=True)
    given = arguments.parse_args()

    snapshot, copy = Snapshot(devices.current(), given.registry), copy_sampler()
    results = []
    for problem in DecodeProblem.suites()["decode"]:
        if given.only in problem.label:
            results.append(measure(problem, snapshot, copy, given.rounds))
            found = results[-1]["candidates"].items()
            shown = "  ".join(f"{name} {row['time_ms']:.4g} ms {row['share_of_copy']:.0%}" for name, row in found)
            print(f"{problem.label} (copy {results[-1]['copy_gbps']:.0f} GB/s): {shown}", flush=True)
    save(given.out, "attention_decode", snapshot.gpu.name, rounds=given.rounds, results=results)


if __name__ == "__main__":
    with torch.no_grad():
        main()
