"""The gated delta rule, forward and with backward: ours, PyTorch by chunks, flash-linear-attention.

    python benchmarks/delta_rule.py --out benchmarks/results/nvidia-h200/delta_rule.json
    python benchmarks/delta_rule.py --kernels --profile --shapes B8,H16,S2048,D128 --contenders tilebook
    python benchmarks/delta_rule.py --device cpu --tiny --out /tmp/tried.json    # does it run to its end?

Timed by events around several calls from Python, in rounds in which the contenders take turns; outputs are compared
with chunks in fp32 on the first heads. Rows of q and k are divided by their lengths, as Qwen3-Next's are. `fla` where
`fla-core` is installed; it tunes its kernels at their first call. `--kernels` forces our kernels with their default
config; `--profile` prints how long each of our kernels takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import rms_off, save

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.kernels.delta_rule.problem import Problem
from tilebook.kernels.delta_rule.pytorch import chunked
from tilebook.tuner.judge.turns import in_turns, peak_mib

SHAPES = ("B8,H16,S2048,D64", "B8,H16,S2048,D128", "B1,H32,S8192,D128", "B4,H32,S8192,D128")
TINY = ("B1,H2,S70,D16",)

Function = Callable[..., torch.Tensor]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    o: torch.Tensor = tilebook.gated_delta_rule(q, k, v, g, beta, normalize_qk=True)
    return o


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return chunked(q, k, v, g, beta, None, q.shape[-1] ** -0.5, True)[0]


def contenders() -> dict[str, Function]:
    """Name → o of q, k, v, log-decays and β."""
    found: dict[str, Function] = {"tilebook": ours, "pytorch": plain, "tilebook again": ours}
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return found

    def fla(*tensors: torch.Tensor) -> torch.Tensor:
        """Of the same views (B, H, S, D): its own layout is (B, S, H, D), which `drawn` lays them in."""
        turned = [x.transpose(1, 2) for x in tensors]
        o: torch.Tensor = chunk_gated_delta_rule(*turned, use_qk_l2norm_in_kernel=True)[0].transpose(1, 2)
        return o

    return found | {"fla": fla}


def drawn(problem: Problem, device: str) -> list[torch.Tensor]:
    """q, k, v, log-decays and β as views of (B, S, H, …), as a model's projections give them."""
    source = torch.Generator(device).manual_seed(0)
    shape = problem.batch, problem.seq, problem.heads
    rows = [
        torch.randn(*shape, width, generator=source, device=device).to(torch.bfloat16)
        for width in (problem.head_dim, problem.head_dim, problem.value_dim)
    ]
    gates, rates = (torch.randn(*shape, generator=source, device=device) for _ in range(2))
    made = [*rows, torch.nn.functional.logsigmoid(gates + 4), rates.sigmoid()]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def run_once(function: Function, tensors: list[torch.Tensor], do: torch.Tensor | None) -> Any:
    if do is None:
        with torch.no_grad():
            return function(*tensors)
    return torch.autograd.grad(function(*tensors), tensors, do)


def off_by(function: Function, tensors: list[torch.Tensor]) -> float:
    """RMS difference from fp32 by chunks, on the first sequence's first heads, relative to the RMS."""
    with torch.no_grad():
        found = function(*tensors)[:1, :2].float()
        right = plain(*(x[:1, :2].float() for x in tensors))
    return rms_off(found, right)


def measure(
    functions: dict[str, Function], tensors: list[torch.Tensor], backward: bool, device: str, turns: int
) -> dict[str, Any]:
    """Name → ms and quartiles, peak memory and error; or why it could not run."""
    do = torch.randn_like(tensors[2]) if backward else None
    found, running = dict[str, Any](), dict[str, Callable[[], Any]]()
    for name, function in functions.items():
        run = functools.partial(run_once, function, tensors, do)
        try:
            run()
            wrong = off_by(function, tensors)
            if not wrong <= 2e-2:
                raise RuntimeError(f"off by {wrong}")
            found[name] = {"error": wrong, "peak_mib": peak_mib(run, device)}
        except Exception as broken:
            found[name] = {"failed": f"{type(broken).__name__}: {broken}"[:300]}
            continue
        running[name] = run
    for name, times in in_turns(running, turns, 1 if turns < 5 else 3, device).items():
        found[name] |= times
    return found


def profiled(tensors: list[torch.Tensor], backward: bool) -> None:
    """Prints the GPU time of each of our kernels, of one call."""
    do, calls = torch.randn_like(tensors[2]) if backward else None, 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run_once(ours, tensors, do)
        torch.cuda.synchronize()
    for each in sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total):
        print(f"    {each.self_device_time_total / calls:9.1f} µs  {each.key[:80]}", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--tiny", action="store_true", help="a short sequence, two rounds")
    arguments.add_argument("--kernels", action="store_true", help="our kernels by default, whatever verdicts say")
    arguments.add_argument("--profile", action="store_true", help="how long each of our kernels takes")
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--shapes", nargs="*", default=SHAPES)
    arguments.add_argument("--contenders", nargs="*", help="these only: tilebook, pytorch, fla")
    given = arguments.parse_args()
    functions = {n: each for n, each in contenders().items() if not given.contenders or n in given.contenders}
    results: dict[str, Any] = {}
    where = devices.current().name if given.device == "cuda" else "cpu"
    with dispatch.use("triton") if given.kernels else contextlib.nullcontext():
        for shape in TINY if given.tiny else given.shapes:
            tensors = drawn(Problem.parse(shape, "bf16"), given.device)
            for backward in (False, True):
                label = f"{shape} {'forward and backward' if backward else 'forward'}"
                turns = 2 if given.tiny else given.rounds
                results[label] = measure(functions, tensors, backward, given.device, turns)
                print(label, flush=True)
                for name, row in results[label].items():
                    told = row.get("failed") or f"{row['ms']:9.4f} ms {row['quartiles']}, {row['peak_mib']} MiB"
                    print(f"  {name:16} {told}", flush=True)
                if given.out:
                    save(given.out, "delta_rule", where, results=results, forced=given.kernels, rounds=given.rounds)
                if given.profile:
                    profiled(tensors, backward)


if __name__ == "__main__":
    main()
