"""An encoder of `torch.nn`'s layers beside one of `tilebook.nn`'s, in training and in evaluation.

    python benchmarks/modules.py --out benchmarks/results/nvidia-h200/modules.json [--only train] [--seconds 120]
    python benchmarks/modules.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

Twelve layers, GELU, norms first or last, of the same weights: bf16 weights, and fp32 weights under bf16 autocast.
Blocks of calls alternate in one process in a new random order each round; PyTorch's take part twice, and the ratio of
the two is the noise. In evaluation PyTorch's layers are one fused op each. `TILEBOOK=1` is PyTorch's modules with that.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from contextlib import nullcontext
from typing import Any

import torch
from compare import arguments, save
from torch import nn
from train_steps import SETTLED_STEPS, Inside, alternated

import tilebook
from tilebook import device as devices

SHAPES = {
    "16 × 256 × 768": (16, 256, 768, 12),
    "64 × 512 × 768": (64, 512, 768, 12),
    "2 × 2048 × 2048": (2, 2048, 2048, 16),
}
LAYERS = 12


class Run:
    """An encoder. how: "pytorch", "tilebook.nn" or "TILEBOOK=1"."""

    def __init__(self, how: str, shape: tuple[int, ...], given: argparse.Namespace, **mode: Any) -> None:
        batch, tokens, width, heads = shape
        self._mode, self._device = mode, given.device
        self.inside: Inside = tilebook.enabled if how == "TILEBOOK=1" else nullcontext
        layer = (tilebook.nn if how == "tilebook.nn" else nn).TransformerEncoderLayer
        torch.manual_seed(0)
        dtype = torch.float32 if mode["autocast"] else torch.bfloat16
        made: dict[str, Any] = {"device": given.device, "dtype": dtype, "norm_first": mode["norm_first"]}
        one = layer(width, heads, 4 * width, mode["dropout"], "gelu", batch_first=True, **made)
        self._model = nn.TransformerEncoder(one, 2 if given.tiny else LAYERS, enable_nested_tensor=False)
        self._model.train(mode["train"])
        self._x = torch.randn(batch, tokens, width, device=given.device, dtype=dtype)
        fused = given.device == "cuda"
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, fused=fused) if mode["train"] else None

    def step(self) -> None:
        cast = torch.autocast(self._device, torch.bfloat16, enabled=self._mode["autocast"])
        with torch.set_grad_enabled(self._mode["train"]):
            with cast:
                loss = self._model(self._x).float().square().mean()
            if self._optimizer is not None:
                loss.backward()
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)


def modes() -> list[dict[str, Any]]:
    found = [
        {"train": train, "norm_first": first, "autocast": autocast, "dropout": dropout}
        for train, first, autocast, dropout in itertools.product(
            (True, False), (True, False), (False, True), (0.0, 0.1)
        )
    ]
    return [mode for mode in found if mode["train"] or not mode["dropout"]]


def named(mode: dict[str, Any]) -> str:
    parts = "train" if mode["train"] else "eval", "pre-norm" if mode["norm_first"] else "post-norm"
    return ", ".join([*parts, "autocast" if mode["autocast"] else "bf16", *(["dropout"] if mode["dropout"] else [])])


def told(row: dict[str, Any]) -> str:
    times = [f"{how} {ms:.3f} ms, {row['peak_mb'][how]} MB" for how, ms in row["ms"].items()]
    ratios = [f"{how} {middle:.3f} ({low:.3f} … {high:.3f})" for how, (low, middle, high) in row["ratio"].items()]
    return "; ".join(times) + "; PyTorch's time over that of " + ", ".join(ratios)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    started, rows = time.time(), list[dict[str, Any]]()
    shapes = {"2 × 8 × 32": (2, 8, 32, 2)} if given.tiny else SHAPES
    for (name, shape), mode in itertools.product(shapes.items(), modes()):
        case = f"{name} {named(mode)}"
        if given.only not in case or time.time() - started > given.seconds:
            continue
        runs = {how: Run(how, shape, given, **mode) for how in ("pytorch", "tilebook.nn", "TILEBOOK=1")}
        settled = SETTLED_STEPS if given.device == "cuda" else 1
        rows.append({"case": case, **alternated(runs, given.rounds, given.device, settled)[1]})
        print(f"{case}: {told(rows[-1])}", flush=True)
        device = devices.current().name if given.device == "cuda" else "cpu"
        save(given.out, "modules", device, rounds=given.rounds, results=rows)
        del runs
        gc.collect()


if __name__ == "__main__":
    main()
