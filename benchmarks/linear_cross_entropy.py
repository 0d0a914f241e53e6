"""The loss of a model's head, forward and backward: tilebook.linear_cross_entropy beside PyTorch's and Liger's.

    python benchmarks/linear_cross_entropy.py --out benchmarks/results/nvidia-h200/linear_cross_entropy.json
    python benchmarks/linear_cross_entropy.py --device cpu --tiny --out /tmp/tried.json     # does it run to its end?

The contenders take turns in rounds, each of which starts with another one, timed by events on the GPU. `products` are
the three matrix products alone, of the whole size by cuBLAS: nothing that computes the gradients does with less.
Memory is what a step takes at most beyond its inputs and gradients. Every contender's gradients are compared with
those of the composition in fp32 before it is timed. Only the first shape is compiled, which takes longest.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import save
from cross_entropy import cast

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.tuner.judge.turns import in_turns

SHAPES = {
    "Llama-3 8B": (8192, 4096, 128256),
    "Llama-3 1B": (8192, 2048, 128256),
    "GPT-2": (8192, 768, 50257),
    "Gemma-2 9B": (4096, 3584, 256000),
}
"""Rows, features and classes."""
TINY = {"tiny": (24, 16, 300), "odd": (9, 7, 1001)}

FORMS = {"bf16": (torch.bfloat16, False), "fp32 weights, bf16 autocast": (torch.float32, True)}
WORST = 3e-2
"""What gradients may be off by, relative to all of them."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def composition(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w), target)


def contenders(compiled: bool) -> dict[str, Loss]:
    """Name → the loss of (hidden, weight, target)."""
    found: dict[str, Loss] = {"pytorch": composition, "tilebook": tilebook.linear_cross_entropy}
    if compiled:
        found["torch.compile"] = torch.compile(composition, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        options: Any = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = lambda x, w, t: F.linear_cross_entropy(x, w, t, options=options)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
    except ImportError:
        return found
    found["liger"] = lambda x, w, t: liger(x, w, t)
    return found


def step(loss: Loss, given: tuple[torch.Tensor, ...], autocast: bool) -> tuple[torch.Tensor, ...]:
    """The gradients of hidden states and weight."""
    x, w, target = given
    with cast(x.device.type, autocast):
        value = loss(x, w, target)
    return torch.autograd.grad(value, (x, w))


def products(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """The three products of a step, into memory that is there already."""
    x, w = x.detach().to(dtype), w.detach().to(dtype)
    logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.t(), x, out=dw)

    return run


def beyond_mib(run: Callable[[], Any], given: tuple[torch.Tensor, ...], device: str) -> float | None:
    """The most memory of a step beyond inputs and gradients; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    gradients = sum(x.numel() * x.itemsize for x in given[:2])
    return round((torch.cuda.max_memory_allocated() - before - gradients) / 2**20, 1)


def off_by(found: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> list[float]:
    return [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True)]


def measure(
    losses: dict[str, Loss], shape: tuple[int, int, int], form: str, device: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """name → median and quartiles in ms, memory in MiB, errors; or why it could not run."""
    (rows, features, classes), (dtype, autocast) = shape, FORMS[form]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, features, generator=generator, device=device).to(dtype).requires_grad_()
    w = (torch.randn(classes, features, generator=generator, device=device) * features**-0.5).to(dtype).requires_grad_()
    given = x, w, torch.randint(classes, (rows,), generator=generator, device=device)
    right = step(composition, (*(y.detach().float().requires_grad_() for y in (x, w)), given[2]), False)
    found, running = dict[str, dict[str, Any]](), dict[str, Callable[[], Any]]()
    for name, loss in losses.items():

        def run(loss: Loss = loss) -> Any:
            return step(loss, given, autocast)

        try:
            errors = off_by(run(), right)
            if not max(errors) <= WORST:
                raise RuntimeError(f"gradients are off by {errors}")
            found[name] = {"errors": errors, "beyond_mib": beyond_mib(run, given, device)}
        except Exception as broken:
            found[name] = {"failed": f"{type(broken).__name__}: {broken}"[:300]}
            continue
        running[name] = run
    running["products"] = products(x, w, torch.bfloat16)
    found["products"] = {}
    for name, times in in_turns(running, rounds, 1, device).items():
        found[name] |= times
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", default="", help="shapes whose name contains this")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--tiny", action="store_true", help="small shapes, two rounds, nothing compiled")
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--seconds", type=float, default=60.0, help="begins no further shape after that")
    given = arguments.parse_args()
    results: dict[str, Any] = {}
    started, rounds = time.time(), 2 if given.tiny else given.rounds
    where = devices.current().name if given.device == "cuda" else "cpu"
    for form in FORMS:
        for name, shape in (TINY if given.tiny else SHAPES).items():
            if given.only not in name or time.time() - started > given.seconds:
                continue
            label = f"{name} M{shape[0]},H{shape[1]},V{shape[2]} {form}"
            with dispatch.use("torch") if given.device == "cpu" else nullcontext():
                found = measure(contenders(name == "Llama-3 8B"), shape, form, given.device, rounds)
            results[label] = found
            print(label, flush=True)
            for contender, row in found.items():
                told = row.get("failed") or f"{row['ms']:9.3f} ms {row['quartiles']}, {row.get('beyond_mib')} MiB"
                print(f"  {contender:22} {told}", flush=True)
            save(given.out, "linear_cross_entropy", where, results=results, rounds=rounds)
            gc.collect()
            if given.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
