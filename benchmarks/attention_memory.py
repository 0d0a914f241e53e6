"""Peak memory of a training step of attention, forward and backward, against the length of the sequence.

    python benchmarks/attention_memory.py --out benchmarks/results/nvidia-h200/attention_memory.json

B1 H16 D64 bf16, causal: `tilebook.attention`, PyTorch's `scaled_dot_product_attention` and the softmax of a matrix in
memory, as far as each fits. What counts is the most that is allocated beyond the inputs and the gradient of the output:
o, the gradients and all between. The exponent is the slope of log(peak) over log(length). With --dry-run it runs small
and on the CPU, where all that a step allocates is counted and nothing is freed, so that its figures mean little.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import save
from torch.utils._python_dispatch import TorchDispatchMode

import tilebook
from tilebook import device as devices

HEADS, WIDTH = 16, 64
LENGTHS = tuple(1 << n for n in range(11, 17))
DRY_LENGTHS = (128, 256, 512)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1) @ v


CONTENDERS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "tilebook": lambda q, k, v: tilebook.attention(q, k, v, causal=True),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "eager": eager,
}


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.bytes += x.untyped_storage().nbytes()
        return made


def peak_bytes(call: Callable[..., torch.Tensor], length: int, device: str) -> int | None:
    """None where the GPU's memory does not suffice."""
    shape = (1, HEADS, length, WIDTH)
    q, k, v, do = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def step() -> None:
        torch.autograd.grad(call(*inputs), inputs, do)

    if device == "cpu":
        with Allocations() as counted:
            step()
        return counted.bytes
    try:
        step()  # compiles, and makes what libraries keep
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def exponent(peaks: dict[int, int]) -> float:
    """Peak ∝ lengthᵉ: e, by least squares over the logarithms."""
    lengths, sizes = ([math.log(x) for x in values] for values in (peaks.keys(), peaks.values()))
    return statistics.linear_regression(lengths, sizes).slope


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--dry-run", action="store_true", help="small, on the CPU: does the program run to its end?")
    given = arguments.parse_args()
    if given.out is None and not given.dry_run:
        arguments.error("--out is missing")

    device, lengths = ("cpu", DRY_LENGTHS) if given.dry_run else ("cuda", LENGTHS)
    peaks: dict[str, dict[int, int]] = {name: {} for name in CONTENDERS}
    for name, call in CONTENDERS.items():
        for length in lengths:
            peak = peak_bytes(call, length, device)
            if peak is None:
                print(f"{name}: {length} does not fit")
                break
            peaks[name][length] = peak
    exponents = {name: exponent(found) for name, found in peaks.items() if len(found) > 1}

    print(f"{'length':>8}" + "".join(f"{name:>12}" for name in peaks) + "   MiB")
    for length in lengths:
        sizes = [found.get(length) for found in peaks.values()]
        print(f"{length:>8}" + "".join(f"{'—' if size is None else f'{size / 2**20:.1f}':>12}" for size in sizes))
    print(f"{'exponent':>8}" + "".join(f"{exponents.get(name, math.nan):>12.3f}" for name in peaks))
    if given.out is None:
        return
    save(
        given.out,
        "attention memory",
        "cpu" if given.dry_run else devices.current().name,
        problem=f"B1,H{HEADS},D{WIDTH},causal bf16, forward and backward",
        peak_bytes=peaks,
        exponent=exponents,
    )


if __name__ == "__main__":
    main()
