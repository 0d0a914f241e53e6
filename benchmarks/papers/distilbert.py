"""DistilBERT as a classifier with attention of several makes: time, memory and accuracy, beside a study of its own.

    python benchmarks/papers/distilbert.py --out benchmarks/results/nvidia-h200/papers/distilbert.json [--data aclImdb]
    python benchmarks/papers/distilbert.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

The study trained it on IMDb, in batches of 16 × 256 tokens; what it made to be efficient was slower and larger. Here
transformers' class runs with attention written out ("pytorch"), PyTorch's fused one, `attn_implementation="tilebook"`,
and PyTorch's under `TILEBOOK=1`: bf16 autocast, AdamW fused, dropout as it comes. Steps are timed in turns in one
process, plain PyTorch's twice for the noise. Then each learns from random weights, from several seeds: reviews of films
with --data, else to tell texts of Python's standard library from PyTorch's.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import texts
import torch
from beside import apart, arguments, attempt, keep, over, table
from e2e import Case, Run, made
from texts import Texts
from train_steps import SETTLED_STEPS, alternated, synchronize

import tilebook
from tilebook.report.plots import Panel, draw

STUDY = {
    "the study's eager": (1104, 1424, 85.2),
    "the study's flash": (1109, 1945, 84.0),
    "the study's linear": (1111, 2469, 83.8),
    "the study's hybrid": (1110, 2993, 84.1),
}
"""Seconds of a whole training, MB, percent of the reviews."""


@dataclass(frozen=True)
class Way:
    """transformers' name of attention, is tilebook on, and what `tilebook.nn.hybrid` is given, if it is called."""

    attention: str
    on: bool = False
    linear: dict[str, Any] | None = None

    def turned(self, model: Any) -> Any:
        if self.linear is not None:
            tilebook.nn.hybrid(model, **self.linear)
        return model


WAYS = {
    "pytorch": Way("eager"),
    "sdpa": Way("sdpa"),
    "attn_implementation": Way("tilebook"),
    "TILEBOOK=1": Way("sdpa", on=True),
}

_TINY = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 99}


def case_of(batch: int, tokens: int, padded: bool = False) -> Case:
    head, config = "AutoModelForSequenceClassification", {"max_position_embeddings": max(512, tokens)}
    return Case("distilbert", head, config, batch, tokens, padded=padded, labels=False, tiny=_TINY)


CASES = {
    "16 × 256": case_of(16, 256),
    "16 × 256, padded": case_of(16, 256, padded=True),
    "64 × 512": case_of(64, 512),
}


def speed(case: Case, ways: dict[str, Way], rounds: int, device: str, tiny: bool) -> dict[str, Any]:
    runs = {}
    for name, way in ways.items():
        runs[name] = Run(case, "tilebook" if way.on else "pytorch", device, tiny, way.attention)
        way.turned(runs[name].model)
    return alternated(runs, rounds, device, SETTLED_STEPS if device == "cuda" else 1)[1]


def learned(case: Case, way: Way, found: Texts, seed: int, given: argparse.Namespace) -> tuple[float, float, float]:
    """(percent of the test's texts, seconds that training took, MB at the most) of a model from this seed."""
    model = way.turned(made(case, given.tiny, given.device, way.attention, seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, weight_decay=0.01, fused=given.device == "cuda")
    steps = given.epochs * max(1, len(found.train[1]) // given.batch)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warm, (steps - n) / steps))
    if given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tilebook.enabled() if way.on else nullcontext():
        synchronize(given.device)
        began = time.perf_counter()
        for ids, labels in islice(_batches(found, given, seed), steps):
            with torch.autocast(given.device, torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=(ids > 0).long(), labels=labels).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        synchronize(given.device)
        seconds = time.perf_counter() - began
        memory = torch.cuda.max_memory_allocated() / 2**20 if given.device == "cuda" else 0.0
        return _accuracy(model.eval(), found, given.device), seconds, memory


def _batches(found: Texts, given: argparse.Namespace, seed: int) -> Any:
    source = torch.Generator().manual_seed(seed)
    ids, labels = found.train
    while True:
        order = torch.randperm(len(labels), generator=source)
        for which in order.split(given.batch)[: max(1, len(order) // given.batch)]:
            yield ids[which].to(given.device), labels[which].to(given.device)


@torch.no_grad()
def _accuracy(model: Any, found: Texts, device: str) -> float:
    right = 0
    with torch.autocast(device, torch.bfloat16):
        for ids, labels in zip(*(each.split(64) for each in found.test), strict=True):
            given = ids.to(device)
            logits = model(input_ids=given, attention_mask=(given > 0).long()).logits
            right += (logits.argmax(1).cpu() == labels).sum().item()
    return 100 * right / len(found.test[1])


def shown(
    rows: list[dict[str, Any]], accuracies: list[dict[str, Any]], seconds: dict[str, list[float]], name: str
) -> str:
    lines: list[list[Any]] = []
    for row in rows:
        if "failed" in row:
            lines.append([f"{row['case']}: {row['failed']}", None, None, None, None])
            continue
        noise = row["ratio"]["again"]
        for way, ms in row["ms"].items():
            low, middle, high = row["ratio"].get(way, noise)
            lines.append([f"{row['case']}, {way}", ms, row["peak_mb"][way], middle, f"{low:.3f} … {high:.3f}"])
    steps = table(["training step", "ms", "MB", "pytorch's time over it", "quartiles"], lines)
    head = [f"learning {name}", "seconds", "MB", "accuracy, %", "points apart", "standard error", "kept"]
    lines = [[each, *figures, None, None, None] for each, figures in STUDY.items()]
    for row in accuracies:
        took, memory = (max(each) for each in zip(*seconds[row["way"]], strict=True))
        kept = "yes" if row["kept"] else "no"
        lines.append([row["way"], took, memory, row["mean"], row["difference"], row["error"], kept])
    return f"{steps}\n\n{table(head, lines)}"


def options(description: str | None, epochs: int, rate: float) -> argparse.ArgumentParser:
    """Arguments of a program that lets models learn texts."""
    parser = arguments(description)
    parser.add_argument("--data", type=Path, help="the folder aclImdb")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=8192, help="to learn from, and half as many to be asked about")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=rate, help="AdamW's greatest step")
    return parser


def main() -> None:
    given = options(__doc__, 2, 1e-4).parse_args()
    tilebook.register_transformers()
    rows, found, costs = list[dict[str, Any]](), dict[str, list[float]](), dict[str, list[tuple[float, float]]]()

    def kept(name: str) -> None:
        keep(given, "DistilBERT", study=STUDY, texts=name, speed=rows, costs=costs, accuracy=apart(found, {}))

    for name, case in CASES.items():
        if not over(given):
            tried = attempt(lambda case=case: speed(case, WAYS, given.rounds, given.device, given.tiny))
            rows.append({"case": name} | tried)
            kept("")
    told = chosen(given, 256)
    for seed in range(given.seeds):
        for name, way in WAYS.items():
            if over(given):
                break
            accuracy, seconds, memory = learned(CASES["16 × 256"], way, told, seed, given)
            found.setdefault(name, []).append(accuracy)
            costs.setdefault(name, []).append((seconds, memory))
            print(f"seed {seed}, {name}: {accuracy:.2f} % after {seconds:.1f} s", flush=True)
            kept(told.name)
    accuracies = apart(found, {})
    print(shown(rows, accuracies, costs, told.name))
    draw(
        given.out,
        [
            *(Panel(f"{row['case']}: ms a step", bars=row["ms"]) for row in rows if "ms" in row),
            Panel(f"{told.name}: accuracy, %", bars={row["way"]: row["mean"] for row in accuracies}),
        ],
    )


def chosen(given: argparse.Namespace, tokens: int, joined: bool = False) -> Texts:
    if given.tiny:
        return texts.tiny(16, _TINY["vocab_size"])
    if given.data is not None:
        return texts.imdb(given.data, tokens, texts.VOCABULARY, given.texts)
    return texts.packages(tokens, texts.VOCABULARY, given.texts, joined)


if __name__ == "__main__":
    main()
