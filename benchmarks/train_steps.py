"""Training steps of whole models: plain PyTorch against the same model with tilebook on.

    python benchmarks/train_steps.py --out benchmarks/results/nvidia-h200/train_steps.json [--only ViT] [--seconds 300]
    python benchmarks/train_steps.py --by-hand --out …      # and its functions written into the models, heads too
    python benchmarks/train_steps.py --device cpu --tiny --modes eager --out /tmp/tried.json     # no GPU, no figures

bf16 autocast over fp32 weights, AdamW fused, eager and compiled. Both start from the same weights and see the same
batches; their first losses must agree. Then blocks of steps alternate in one process, in a new random order each round;
PyTorch's take part twice, and the ratio of the two is the noise. On is what `TILEBOOK=1` is: no line of the model is
changed. ViT and DistilBERT are timm's and transformers' where these are installed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from compare import arguments, save
from small_models import (
    BERT,
    CCT,
    PYTORCH,
    TILEBOOK,
    Foreign,
    Functions,
    Llama,
    Sizes,
    ViT,
    attention_by,
    timm_vit,
    transformers_distilbert,
)
from torch import nn

import tilebook
from tilebook import device as devices

Make = Callable[[Sizes, Functions], nn.Module]
Inside = Callable[[], AbstractContextManager[Any]]

CASES: dict[str, tuple[tuple[Make, ...], Sizes]] = {
    "ViT-B/16 × 64": ((timm_vit, ViT), Sizes(12, 768, 12, 3072, 197, 64)),
    "CCT-14 × 8": ((CCT,), Sizes(14, 384, 6, 1152, 196, 8)),
    "CCT-14 × 128": ((CCT,), Sizes(14, 384, 6, 1152, 196, 128)),
    "DistilBERT 16 × 256": (
        (transformers_distilbert, BERT),
        Sizes(6, 768, 12, 3072, 256, 16, vocabulary=30522, classes=2),
    ),
    "DistilBERT 64 × 512": (
        (transformers_distilbert, BERT),
        Sizes(6, 768, 12, 3072, 512, 64, vocabulary=30522, classes=2),
    ),
    "Llama-like 4 × 2048": ((Llama,), Sizes(4, 2048, 16, 8192, 2048, 4, heads_kv=4, vocabulary=128256)),
    "Llama-like 4 × 2048, 32 heads": ((Llama,), Sizes(4, 2048, 32, 8192, 2048, 4, heads_kv=8, vocabulary=32000)),
}
"""The first of the makers that can serves."""

COMPARED_STEPS = 10
SETTLED_STEPS = 60
"""After which who serves calls that depend on the program is settled."""
LOSS_TOLERANCE = 0.02
BLOCK_MS = 250.0
"""A block of steps lasts about this long."""

_BATCHES = 4
OWN_GRAPHS: dict[str, Any] = {"max_autotune": False}
"""What Inductor does anyway; but graphs of other options are not taken, and with tilebook a program traces its own."""


class Run:
    """One model in training. inside: what its steps are to be in; a program enters it once, not at each step."""

    def __init__(
        self, model: nn.Module, use: Functions, sizes: Sizes, device: str, compiled: bool, on: bool = False
    ) -> None:
        self.inside: Inside = tilebook.enabled if on else nullcontext
        if isinstance(model, Foreign) and use is not PYTORCH:
            self.inside = functools.partial(attention_by, use)
        self.model, self._device = model.to(device).train(), device
        self._head_in_model = isinstance(model, Llama) and use.head_loss is not None
        self._called = torch.compile(self.model, options=OWN_GRAPHS if on else None) if compiled else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device == "cuda")
        self._batches, self._next = _data(sizes, device), 0

    def step(self) -> torch.Tensor:
        """One step; the loss, which nobody waits for."""
        loss = self._loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def forward(self) -> torch.Tensor:
        """The loss, recorded for gradients that nobody asks for."""
        return self._loss()

    def _loss(self) -> torch.Tensor:
        given, wanted = self._batches[self._next % _BATCHES]
        self._next += 1
        with torch.autocast(self._device, torch.bfloat16):
            if self._head_in_model:
                return self._called(given, wanted)
            out = self._called(given)
            return F.cross_entropy(out.flatten(0, -2), wanted.flatten())


def _data(s: Sizes, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator(device).manual_seed(1)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=source, device=device)

    found = []
    for _ in range(_BATCHES):
        if not s.vocabulary:
            images = torch.randn(s.batch, 3, s.image, s.image, generator=source, device=device)
            found.append((images, whole(s.classes, s.batch)))
        elif s.heads_kv:
            ids = whole(s.vocabulary, s.batch, s.tokens + 1)
            found.append((ids[:, :-1], ids[:, 1:]))
        else:
            found.append((whole(s.vocabulary, s.batch, s.tokens), whole(s.classes, s.batch)))
    return found


def made(
    makers: tuple[Make, ...], sizes: Sizes, device: str, compiled: bool, tiny: bool, by_hand: bool
) -> tuple[str, dict[str, Run]]:
    """Where the model is from, and the model in training, plain and with tilebook, of equal weights."""
    use = TILEBOOK if by_hand else PYTORCH
    for make in makers[-1:] if tiny else makers:
        try:
            torch.manual_seed(0)
            plain, other = make(sizes, PYTORCH), make(sizes, use)
            other.load_state_dict(copy.deepcopy(plain.state_dict()))
        except Exception as missing:
            if make is makers[-1]:
                raise
            print(f"  {make.__name__}: {type(missing).__name__}: {missing}; the definition here serves", flush=True)
            continue
        runs = {"pytorch": Run(plain, PYTORCH, sizes, device, compiled)}
        return make.__name__, {**runs, "tilebook": Run(other, use, sizes, device, compiled, on=True)}
    raise AssertionError("the last maker serves or raises")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def losses(runs: dict[str, Run]) -> dict[str, Any]:
    """The first losses of both, which compile what is to be compiled, and how far they part, by the largest of them."""
    found = {}
    for name, run in runs.items():
        with run.inside():
            found[name] = [float(run.step()) for _ in range(COMPARED_STEPS)]
    apart = max(abs(a - b) for a, b in zip(found["pytorch"], found["tilebook"], strict=True)) / max(found["pytorch"])
    return {"losses": found, "apart": apart, "agree": apart <= LOSS_TOLERANCE}


def block(run: Any, steps: int, device: str) -> tuple[float, float]:
    """(ms a step, the most bytes allocated beyond what lay there before)."""
    with run.inside():
        return _block(run, steps, device)


def _block(run: Any, steps: int, device: str) -> tuple[float, float]:
    resting = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        resting = torch.cuda.memory_allocated()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    synchronize(device)
    ms = (time.perf_counter() - start) * 1e3 / steps
    return ms, torch.cuda.max_memory_allocated() - resting if device == "cuda" else 0


def alternated(runs: dict[str, Any], rounds: int, device: str, settled: int) -> tuple[int, dict[str, Any]]:
    """(steps a block, what of each run is worth telling) of blocks that alternate after so many steps, PyTorch's twice.

    ms a step, the most memory, and by round the ratio of plain PyTorch to each: its quartiles.
    """
    estimate = max(block(run, 3 if device == "cpu" else settled, device)[0] for run in runs.values())
    if estimate < BLOCK_MS:  # else a step is as good as a block, and they are few
        estimate = max(block(run, 3, device)[0] for run in runs.values())
    steps, order = max(2 if estimate < BLOCK_MS else 1, math.ceil(BLOCK_MS / estimate)), random.Random(0)
    if device == "cpu":
        steps = 2
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in (*runs, "again")}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(list(timed), len(timed)):
                timed[name].append(block(runs["pytorch" if name == "again" else name], steps, device))
    finally:
        gc.enable()
    ms = {name: [each for each, _ in series] for name, series in timed.items()}
    ratios = {name: [a / b for a, b in zip(ms["pytorch"], its, strict=True)] for name, its in ms.items()}
    return steps, {
        "ms": {name: round(statistics.median(ms[name]), 4) for name in runs},
        "peak_mb": {name: round(max(b for _, b in timed[name]) / 2**20) for name in runs},
        "ratio": {
            name: [round(value, 4) for value in statistics.quantiles(series, n=4, method="inclusive")]
            for name, series in ratios.items()
            if name != "pytorch"
        },
    }


def measure(runs: dict[str, Run], rounds: int, device: str) -> dict[str, Any]:
    """ms a step and peak memory of each, and the ratio to plain PyTorch round by round."""
    steps, found = alternated(runs, rounds, device, SETTLED_STEPS)
    ratios = found.pop("ratio")
    return {"steps_a_block": steps, **found, "ratio": ratios["tilebook"], "noise": ratios["again"]}


def case(name: str, mode: str, given: argparse.Namespace) -> dict[str, Any]:
    makers, sizes = CASES[name]
    sizes = sizes.tiny() if given.tiny else sizes
    row: dict[str, Any] = {"model": name, "mode": mode}
    try:
        row["source"], runs = made(makers, sizes, given.device, mode == "compiled", given.tiny, given.by_hand)
        row.update(losses(runs))
        row.update(measure(runs, given.rounds, given.device))
    except Exception as broken:
        row["failed"] = f"{type(broken).__name__}: {broken}"[:500]
    runs = {}
    torch.compiler.reset()
    gc.collect()
    if given.device == "cuda":
        torch.cuda.empty_cache()
    return row


def shown(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['model']} {row['mode']}: {row['failed']}"
    low, middle, high = row["ratio"]
    ms, peak = row["ms"], row["peak_mb"]
    return (
        f"{middle:.3f} ({low:.3f} … {high:.3f}; noise {row['noise'][1]:.3f})  {row['model']} {row['mode']} "
        f"({row['source']}): {ms['pytorch']:.2f} → {ms['tilebook']:.2f} ms, {peak['pytorch']} → {peak['tilebook']} MB, "
        f"losses {row['apart']:.1e} apart{'' if row['agree'] else ': TOO FAR'}"
    )


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--by-hand", action="store_true", help="tilebook's functions, written into the models")
    given = parser.parse_args()
    started, rows = time.time(), list[dict[str, Any]]()
    for mode in given.modes.split(","):
        for name in CASES:
            if given.only not in name or time.time() - started > given.seconds:
                continue
            rows.append(case(name, mode, given))
            print(shown(rows[-1]), flush=True)
            device = devices.current().name if given.device == "cuda" else "cpu"
            save(given.out, "training steps", device, rounds=given.rounds, by_hand=given.by_hand, results=rows)
    print("\nworst first")
    for row in sorted(rows, key=lambda row: row.get("ratio", [0, 0, 0])[1]):
        print(shown(row))


if __name__ == "__main__":
    main()
