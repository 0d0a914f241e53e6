"""Packed sequences on this GPU: our kernel beside PyTorch's FlashAttention-2 for packs and SDPA on padded sequences.

    python benchmarks/varlen.py --out benchmarks/results/nvidia-h200/varlen.json [--registry PATH] [--only causal]
    python benchmarks/varlen.py --dry-run        # no GPU: the contenders' numbers on a small pack, and no times

Forward and backward of the suite `varlen`. All of a problem are captured as CUDA graphs and sampled interleaved. SDPA
takes part in the forward pass only, on tensors that are padded already: padding itself is not counted. TFLOP/s count
the pairs of a row and a column that the pack has. PyTorch a sequence at a time reads the lengths, so no graph holds it.
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
from tilebook.kernels.varlen.problem import ForwardProblem
from tilebook.op import Op
from tilebook.tuner.judge.measure import Bench, interleave
from tilebook.tuner.judge.stats import median, speedup

OPS = ("attention_varlen_fwd", "attention_varlen_bwd")
SMALL = ForwardProblem.parse("B4,H4,Hkv2,T256,S128,D32,causal", "fp32")


def _pad(x: torch.Tensor, lengths: list[int], longest: int) -> torch.Tensor:
    """(T, H, D) → (B, H, longest, D)"""
    padded = x.new_zeros(len(lengths), longest, *x.shape[1:])
    for row, part in zip(padded, x.split(lengths), strict=True):
        row[: len(part)] = part
    return padded.transpose(1, 2)


def padded(problem: ForwardProblem) -> tuple[Callable[..., torch.Tensor], Callable[[Any], tuple[Any, ...]]]:
    """SDPA on a padded pack, and what makes its inputs; a mask only where a causal one aligned top-left will not do."""
    lengths_q, lengths_k = problem.lengths(0)

    def inputs(packed: Any) -> tuple[Any, ...]:
        q, k, v, *_ = packed
        sides = ((q, lengths_q, problem.max_q), (k, lengths_k, problem.max_k), (v, lengths_k, problem.max_k))
        mask = None
        if not problem.causal or lengths_q != lengths_k:
            n_q, n_k = (torch.tensor(n, device=q.device)[:, None, None] for n in (lengths_q, lengths_k))
            columns, rows = torch.arange(problem.max_k, device=q.device), torch.arange(problem.max_q, device=q.device)
            seen = (columns < n_k) & ((columns <= rows[:, None] + n_k - n_q) if problem.causal else True)
            mask = seen[:, None]
        return *(_pad(*side) for side in sides), mask

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )

    return attend, inputs


def measure(op: Op[Any], problem: Any, snapshot: Snapshot, rounds: int) -> dict[str, Any]:
    running = {name: found for name, found in contenders(op, problem, snapshot).items() if name != "torch"}
    packed = problem.inputs("cuda", 0)
    bench = Bench(packed, snapshot.gpu.l2)
    calls: list[tuple[str, Callable[..., Any], Bench]] = [
        (name, lambda *args, _i=implementation, _c=config: _i(*args, config=_c), bench)
        for name, (implementation, config) in running.items()
    ]
    if op.name == OPS[0]:
        attend, inputs = padded(problem)
        calls.append(("sdpa_padded", attend, Bench(inputs(packed), snapshot.gpu.l2)))
    samplers = {}
    for name, call, its in calls:
        try:
            call(*its.inputs[0])
            samplers[name] = its.capture(call, its.estimate(call))
        except Exception as broken:
            print(f"  {problem.label}: {name}: {type(broken).__name__}: {broken}"[:300], flush=True)
    series = dict(zip(samplers, interleave(list(samplers.values()), rounds, 0), strict=True))
    rows = {}
    for name, samples in series.items():
        middle = median(samples)
        implementation, config = running.get(name, (None, None))
        rows[name] = {
            "implementation": implementation.name if implementation else "sdpa",
            "config": dict(config or {}),
            "time_ms": middle,
            "spread": (max(samples) - min(samples)) / middle,
            "tflops": problem.cost().flops / middle / 1e9,
        }
        for other in ("sdpa_padded", "flash_attention_2"):
            if other in series:
                ratio = speedup(series[other], samples)
                rows[name][f"speedup_over_{other}"] = [ratio.value, ratio.low, ratio.high]
    lengths_q, lengths_k = problem.lengths(0)
    return {
        "op": op.name,
        "problem": problem.label,
        "dtype": problem.dtype,
        "lengths_q": lengths_q,
        "lengths_k": lengths_k,
        "candidates": rows,
    }


def dry_run() -> None:
    """The small pack by PyTorch a sequence at a time and by SDPA padded: they must agree."""
    packed = SMALL.inputs("cpu", 0)
    o, _ = ops.get(OPS[0]).implementations["torch"](*packed)
    attend, inputs = padded(SMALL)
    other = attend(*inputs(packed)).transpose(1, 2)
    unpadded = torch.cat([row[:n] for row, n in zip(other, SMALL.lengths(0)[0], strict=True)])
    torch.testing.assert_close(o, unpadded, rtol=1e-4, atol=1e-4)
    for name in OPS:
        for problem in ops.get(name).problem.suites()["varlen"]:
            print(f"{name} {problem.label}: {problem.cost().flops / 1e12:.3g} TFLOP, longest {problem.max_q}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--registry")
    arguments.add_argument("--only", default="", help="problems whose label contains this")
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--dry-run", action="store_true")
    given = arguments.parse_args()
    if given.dry_run:
        return dry_run()
    if given.out is None:
        arguments.error("--out is needed")

    snapshot = Snapshot(devices.current(), given.registry)
    results = []
    for op in map(ops.get, OPS):
        for problem in op.problem.suites()["varlen"]:
            if given.only in problem.label:
                results.append(measure(op, problem, snapshot, given.rounds))
                found = results[-1]["candidates"].items()
                shown = "  ".join(f"{name} {row['time_ms']:.4g} ms {row['tflops']:.0f} TFLOP/s" for name, row in found)
                print(f"{op.name} {problem.label}: {shown}", flush=True)
    save(given.out, "attention_varlen", snapshot.gpu.name, rounds=given.rounds, results=results)


if __name__ == "__main__":
    with torch.no_grad():
        main()
