"""Cross entropy as a training step has it: tilebook.cross_entropy beside PyTorch's, its compiler's and Liger's.

    python benchmarks/cross_entropy.py --out benchmarks/results/nvidia-h200/cross_entropy.json
    python benchmarks/cross_entropy.py --device cpu --tiny --out /tmp/tried.json     # does the program run to its end?

Forward and backward of the mean over all rows, from Python, timed by events on the GPU in rounds in which the
contenders take turns; each round starts with another one. `--kernels` forces our kernels where no verdict has them.
Every contender's loss and gradient is compared with PyTorch's in fp32 before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compare import save

import tilebook
from tilebook import device as devices
from tilebook import dispatch
from tilebook.tuner.judge.turns import in_turns, peak_mib

SHAPES = ((4096, 30522), (8192, 32000), (8192, 128256), (8192, 151936))
TINY = ((24, 300), (9, 1001))

FORMS = {"bf16": (torch.bfloat16, False), "bf16, autocast": (torch.bfloat16, True), "fp32": (torch.float32, False)}
"""Name → (dtype of the logits, is autocast on)."""

WORST = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""What a gradient may be off by, relative to the largest."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def contenders(compiled: bool) -> dict[str, Loss]:
    """Name → the loss of (logits, target). PyTorch's own twice: what the two differ by is the noise."""

    def pytorch(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, target)

    found: dict[str, Loss] = {"pytorch": pytorch, "tilebook": tilebook.cross_entropy, "pytorch again": pytorch}
    if compiled:
        found["torch.compile"] = torch.compile(pytorch, dynamic=False)
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return found
    found["liger"] = liger_cross_entropy
    return found


@contextmanager
def cast(device: str, on: bool) -> Iterator[None]:
    with torch.autocast(device, torch.bfloat16) if on else contextlib.nullcontext():
        yield


def step(loss: Loss, x: torch.Tensor, target: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient."""
    with cast(x.device.type, autocast):
        value = loss(x, target)
    return value.detach(), torch.autograd.grad(value, x)[0]


def off_by(found: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Largest relative difference of the loss, and of a sample of the gradient's rows."""
    loss = ((found[0].float() - right[0]).abs() / right[0].abs()).item()
    rows = slice(None, None, max(1, len(right[1]) // 64))
    grad = (found[1][rows].float() - right[1][rows].float()).abs().max() / right[1][rows].float().abs().max()
    return [loss, grad.item()]


def measure(
    losses: dict[str, Loss], shape: tuple[int, int], form: str, device: str, rounds: int, calls: int
) -> dict[str, Any]:
    """name → median and quartiles in ms, peak memory in MiB, errors; or why it could not run."""
    (rows, classes), (dtype, autocast) = shape, FORMS[form]
    generator = torch.Generator(device).manual_seed(0)
    given = torch.randn(rows, classes, generator=generator, device=device).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    right = step(F.cross_entropy, given.float().requires_grad_(), target, False)
    right = right[0], right[1].to(dtype)
    x, found, running = given.requires_grad_(), dict[str, Any](), dict[str, Callable[[], Any]]()
    for name, loss in losses.items():
        # Liger writes the gradient over the logits.
        own = x.detach().clone().requires_grad_() if name == "liger" else x

        def run(loss: Loss = loss, own: torch.Tensor = own) -> Any:
            return step(loss, own, target, autocast)

        try:
            errors = off_by(run(), right)
            if not max(errors) <= WORST[dtype]:
                raise RuntimeError(f"loss and gradient are off by {errors}")
        except Exception as broken:
            found[name] = {"failed": f"{type(broken).__name__}: {broken}"[:300]}
            continue
        found[name] = {"errors": errors, "peak_mib": peak_mib(run, device)}
        running[name] = run
    for name, times in in_turns(running, rounds, calls, device).items():
        found[name] |= times
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments.add_argument("--tiny", action="store_true", help="small shapes, two rounds, nothing compiled")
    arguments.add_argument("--kernels", action="store_true", help="our kernels, whatever verdicts say")
    arguments.add_argument("--rounds", type=int, default=25)
    arguments.add_argument("--calls", type=int, default=4, help="calls of a turn")
    given = arguments.parse_args()
    rounds, calls = (2, 1) if given.tiny else (given.rounds, given.calls)
    results: dict[str, Any] = {}
    with dispatch.use("triton") if given.kernels else contextlib.nullcontext():
        for shape in TINY if given.tiny else SHAPES:
            for form in FORMS:
                torch._dynamo.reset()
                label = f"M{shape[0]},V{shape[1]} {form}"
                results[label] = measure(contenders(not given.tiny), shape, form, given.device, rounds, calls)
                print(label, flush=True)
                for name, row in results[label].items():
                    told = row.get("failed") or f"{row['ms']:9.4f} ms {row['quartiles']}, {row['peak_mib']} MiB"
                    print(f"  {name:14} {told}", flush=True)
    where = devices.current().name if given.device == "cuda" else "cpu"
    save(given.out, "cross_entropy", where, results=results, forced=given.kernels, rounds=rounds, calls=calls)


if __name__ == "__main__":
    main()
