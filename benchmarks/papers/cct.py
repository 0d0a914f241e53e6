"""CCT with fused attention and a fused MLP: speed, memory, and the accuracy that a study of it lost.

    python benchmarks/papers/cct.py --out benchmarks/results/nvidia-h200/papers/cct.json [--data cifar-10-batches-py]
    python benchmarks/papers/cct.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

The study fused attention and the MLP of CCT-14/7x2_384 (Flowers-102, batches of 8, a seventh of an A100), was faster,
and lost over 20 points of accuracy. Here the authors' program runs beside PyTorch's fused attention, tilebook's
attention, its MLP, both, and `TILEBOOK=1` with nothing else changed; bf16 autocast, AdamW. Then CCT-7/3x1_32 learns
with each of them from several seeds, and with faults put in on purpose: which of them lose what the study lost? What a
fault does to weights that were learned without it is the second figure. Differences are between runs of one seed, that
is of the same first weights and batches; those of `sdpa`, which drops other weights of attention, are the noise.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from beside import apart, arguments, attempt, keep, over, table
from cct_model import CCT, CCT_7, CCT_14, Shape
from faults import FAULTS, PLAIN, WAYS, Way
from images import Images, chosen
from train_steps import SETTLED_STEPS, Run, alternated

import tilebook
from tilebook.report.plots import Panel, draw

STUDY = {
    "the study's baseline": {"forward": (253.3, 47.2), "step": (5325.0, None)},
    "the study's fused": {"forward": (217.1, 11.3), "step": (4481.0, None)},
}
"""ms, and GB of memory."""

SHAPES = {"CCT-14/7x2_384 × 8": CCT_14, "CCT-7/3x1_32 × 128": CCT_7}


class Forward:
    """The forward passes of a model in training."""

    def __init__(self, run: Run) -> None:
        self.step, self.inside = run.forward, run.inside


def speed(shape: Shape, rounds: int, device: str) -> dict[str, Any]:
    """Forward passes and training steps of every way, in turns."""
    runs = {}
    for name, way in WAYS.items():
        torch.manual_seed(0)
        runs[name] = Run(CCT(shape, way.use), PLAIN, shape.sizes, device, False, on=way.on)
    settled = SETTLED_STEPS if device == "cuda" else 1
    _, step = alternated(runs, rounds, device, settled)
    _, forward = alternated({name: Forward(run) for name, run in runs.items()}, rounds, device, settled)
    return {"forward": forward, "step": step}


def trained(shape: Shape, way: Way, images: Images, seed: int, given: argparse.Namespace) -> CCT:
    """A model after so many steps from this seed."""
    torch.manual_seed(seed)
    model = CCT(shape, way.use).to(given.device, way.weights).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.03, fused=given.device == "cuda")
    warm = max(1, given.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / warm) * (1 + math.cos(math.pi * n / given.steps)) / 2
    )
    scaler = torch.amp.GradScaler(given.device, enabled=way.dtype == torch.float16 and way.scaled)
    for x, wanted in islice(_batches(images, shape.sizes.batch, seed), given.steps):
        with tilebook.enabled() if way.on else nullcontext():
            with torch.autocast(given.device, way.dtype or torch.bfloat16):
                loss = F.cross_entropy(model(x), wanted)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def _batches(images: Images, size: int, seed: int) -> Any:
    """Without end: every image once, in another order each time, moved a little."""
    source = torch.Generator().manual_seed(seed)
    x, wanted = images.train
    while True:
        order = torch.randperm(len(wanted), generator=source).to(x.device)
        for which in order.split(size)[: max(1, len(order) // size)]:
            down, right, mirror = torch.randint(-3, 4, (3,), generator=source).tolist()
            moved = x[which].roll((down, right), (2, 3))
            yield moved.flip(3) if images.mirrored and mirror > 0 else moved, wanted[which]


@torch.no_grad()
def accuracy(model: CCT, way: Way, images: Images, device: str) -> float:
    """Percent of the test's images."""
    model.train(way.drops)
    right = 0
    with tilebook.enabled() if way.on else nullcontext(), torch.autocast(device, way.dtype or torch.bfloat16):
        for x, wanted in zip(*(each.split(512) for each in images.test), strict=True):
            right += (model(x).argmax(1) == wanted).sum().item()
    return 100 * right / len(images.test[1])


def put_in(way: Way, model: CCT, shape: Shape, images: Images, device: str) -> float:
    """What a way makes of weights that were learned in another."""
    other = CCT(shape, way.use).to(device)
    other.load_state_dict(model.state_dict())
    return accuracy(other.to(way.weights), way, images, device)


def shown(rows: list[dict[str, Any]], accuracies: list[dict[str, Any]], images: str) -> str:
    parts = []
    for what, title in (("forward", "forward"), ("step", "training step")):
        lines: list[list[Any]] = [[name, *each[what], None] for name, each in STUDY.items()]
        for row in rows:
            if "failed" in row:
                lines.append([f"{row['model']}: {row['failed']}", None, None, None])
                continue
            ratios, peaks = row[what]["ratio"], row[what]["peak_mb"]
            lines += [
                [f"{row['model']}, {way}", ms, peaks[way] / 1024, ratios[way][1] if way in ratios else 1.0]
                for way, ms in row[what]["ms"].items()
            ]
        parts.append(table([title, "ms", "GB", "pytorch's time over it"], lines))
    lines = [
        [row["way"], row["mean"], row["difference"], row["error"], row["put_in"], "yes" if row["kept"] else "no"]
        for row in accuracies
    ]
    study = ["the study's fused", None, "more than 20 lost", None, None, "no"]
    head = [f"CCT-7 on {images}", "accuracy, %", "points apart", "standard error", "put in later, %", "kept"]
    return "\n\n".join([*parts, table(head, [study, *lines])])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10's python batches")
    parser.add_argument("--images", choices=("cifar", "digits", "drawn"), default="")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--parts", default="speed,ways,faults")
    given = parser.parse_args()
    parts = given.parts.split(",")
    rows, found, put = list[dict[str, Any]](), dict[str, list[float]](), dict[str, float]()
    images = chosen(given.images, given.data, given.tiny).to(given.device)

    def kept() -> None:
        keep(given, "CCT", images=images.name, steps=given.steps, study=STUDY, speed=rows, accuracy=apart(found, put))

    if "speed" in parts:
        for name, shape in SHAPES.items():
            if not over(given):
                tried = shape.tiny() if given.tiny else shape
                rows.append({"model": name} | attempt(lambda tried=tried: speed(tried, given.rounds, given.device)))
                kept()
    shape = CCT_7.tiny() if given.tiny else CCT_7
    ways = (WAYS if "ways" in parts else {"pytorch": WAYS["pytorch"]}) | (FAULTS if "faults" in parts else {})
    for seed in range(given.seeds if {"ways", "faults"} & {*parts} else 0):
        for name, way in ways.items():
            if over(given):
                break
            model = trained(shape, way, images, seed, given)
            found.setdefault(name, []).append(accuracy(model, way, images, given.device))
            print(f"seed {seed}, {name}: {found[name][-1]:.2f} %", flush=True)
            if seed == 0 and name == "pytorch":
                put = {each: put_in(other, model, shape, images, given.device) for each, other in ways.items()}
            kept()
    accuracies = apart(found, put)
    print(shown(rows, accuracies, images.name))
    draw(
        given.out,
        [
            *(
                Panel(f"{row['model']}, {what}: ms", bars=row[what]["ms"])
                for row in rows
                for what in ("forward", "step")
                if what in row
            ),
            Panel(f"CCT-7 on {images.name}: accuracy, %", bars={row["way"]: row["mean"] for row in accuracies}),
        ],
    )


if __name__ == "__main__":
    main()
