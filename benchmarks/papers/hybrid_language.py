"""A small causal language model of bytes, with exact, linear and gated attention, and with both: loss, time, memory.

    python benchmarks/papers/hybrid_language.py --out benchmarks/results/nvidia-h200/papers/hybrid_language.json
    python benchmarks/papers/hybrid_language.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

Texts are what installed packages say of themselves, no file's on both sides of the split. Layers have rotary positions
and one of: exact causal attention; linear attention, elu + 1; gated linear attention with a decay of each channel
(GLA), its outputs normalized by head. 1:3 and 1:7 have one exact layer for three and seven gated ones. MLPs are as wide
as makes parameters equal. Each way learns the same batches at the first of `--lengths`, from as many seeds as are asked
for; steps are timed in turns at all lengths, in batches of so many tokens as the longest has.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from beside import arguments, attempt, keep, over, table
from texts import _QUOTED
from torch import nn

import tilebook
from tilebook.report.plots import Panel, draw
from tilebook.tuner.judge.turns import in_turns, peak_mib

WAYS = {
    "exact": ("exact",),
    "linear": ("linear",),
    "gated": ("gated",),
    "1:3": ("gated", "gated", "gated", "exact"),
    "1:7": ("gated",) * 7 + ("exact",),
}
"""Kinds of layers, from the first on, over and over."""

BYTES = 256
RANK = 16
"""Of the projection that makes decays."""

SHARPNESS = 16.0
"""Logarithms of sigmoids are divided by that to be decays, as GLA has them."""


class Attention(nn.Module):
    """Heads of one kind: exact, linear or gated."""

    def __init__(self, width: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        if kind == "gated":
            self.decays = nn.Sequential(nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width))
            self.norm = nn.Parameter(torch.ones(width // heads))

    def forward(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        q, k = tilebook.apply_rope(q, k, *turns)
        if self.kind == "exact":
            o = tilebook.attention(q, k, v, causal=True)
        elif self.kind == "linear":
            o = tilebook.linear_attention(q, k, v, causal=True)
        else:
            g = F.logsigmoid(self.decays(x).float()) / SHARPNESS
            o = tilebook.gated_linear_attention(q, k, v, g.unflatten(-1, (self.heads, -1)).transpose(1, 2))
            o = tilebook.rms_norm(o, self.norm)
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Logits of the byte behind each one."""

    def __init__(self, kinds: tuple[str, ...], layers: int, width: int, heads: int, hidden: list[int]) -> None:
        super().__init__()
        self.embedding, self.final = nn.Embedding(BYTES, width), nn.RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)  # it is the last layer too
        self.attention = nn.ModuleList(Attention(width, heads, kinds[i % len(kinds)]) for i in range(layers))
        self.norms = nn.ModuleList(nn.ModuleList((nn.RMSNorm(width), nn.RMSNorm(width))) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * n, bias=False) for n in hidden)
        self.down = nn.ModuleList(nn.Linear(n, width, bias=False) for n in hidden)
        angles = torch.outer(torch.arange(1 << 16), 1e4 ** -(torch.arange(0, width // heads, 2) / (width // heads)))
        self.register_buffer("angles", angles.repeat(1, 2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, angles = self.embedding(ids), self.angles[: ids.shape[1]]
        turns = angles.cos(), angles.sin()
        for attention, norms, up, down in zip(self.attention, self.norms, self.up, self.down, strict=True):
            x = x + attention(norms[0](x), turns)
            gate, values = up(norms[1](x)).chunk(2, -1)
            x = x + down(F.silu(gate) * values)
        return self.final(x) @ self.embedding.weight.T  # type: ignore[no-any-return]


def model_of(way: str, layers: int, width: int, heads: int) -> Model:
    """With MLPs so wide that all ways have as many parameters as exact attention, but for less than one column each."""
    kinds, usual = WAYS[way], 8 * width // 3
    more = 2 * width * RANK + width + width // heads
    hidden = [usual - more // (3 * width) * (kinds[i % len(kinds)] == "gated") for i in range(layers)]
    return Model(kinds, layers, width, heads, hidden)


def corpus(asked: bool, most: int) -> torch.Tensor:
    """Bytes of quoted texts of Python's standard library and of PyTorch, of one side of the split."""
    folders, found, size = (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent), list[bytes](), 0
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            name = str(file.relative_to(folder))
            if "site-packages" in name or (crc32(name.encode()) % 8 == 0) != asked or size >= most:
                continue
            found += [text.encode() + b"\0" for text in _QUOTED.findall(file.read_text(errors="replace"))]
            size = sum(map(len, found))
    return torch.frombuffer(bytearray(b"".join(found)[:most]), dtype=torch.uint8)


def loss_of(model: Model, ids: torch.Tensor, device: str) -> torch.Tensor:
    """In bits a byte."""
    with torch.autocast(device, torch.bfloat16):
        logits = model(ids[:, :-1])
    return tilebook.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()) / math.log(2)


def batches(text: torch.Tensor, tokens: int, rows: int, seed: int, device: str) -> Callable[[], torch.Tensor]:
    source = torch.Generator().manual_seed(seed)

    def drawn() -> torch.Tensor:
        begins = torch.randint(len(text) - tokens - 1, (rows,), generator=source)
        return torch.stack([text[b : b + tokens + 1] for b in begins.tolist()]).long().to(device)

    return drawn


def learned(way: str, sizes: tuple[int, int, int], seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Losses along the way, the one on texts that were not learned, and seconds."""
    torch.manual_seed(seed)
    tokens = given.lengths[0]
    rows, model = max(1, given.batch // tokens), model_of(way, *sizes).to(given.device)
    draw_batch = batches(corpus(False, given.bytes), tokens, rows, seed, given.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, betas=(0.9, 0.95), weight_decay=0.1)
    curve, begun = list[float](), time.monotonic()
    for step in range(given.steps):
        warm, left = min(1.0, (step + 1) / max(1, given.steps // 20)), step / given.steps
        optimizer.param_groups[0]["lr"] = given.rate * warm * (0.55 + 0.45 * math.cos(math.pi * left))
        loss = loss_of(model, draw_batch(), given.device)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, given.steps // 50) == 0:
            curve.append(loss.item())
    seconds, asked = time.monotonic() - begun, batches(corpus(True, given.bytes // 8), tokens, rows, 0, given.device)
    with torch.no_grad():
        held = statistics.fmean(loss_of(model, asked(), given.device).item() for _ in range(2 if given.tiny else 32))
    return {"way": way, "seed": seed, "curve": curve, "held_out": held, "seconds": seconds}


def timed(tokens: int, sizes: tuple[int, int, int], given: argparse.Namespace) -> dict[str, Any]:
    """A training step of each way without its optimizer, in turns: ms, quartiles and memory."""
    rows, running, found = max(1, given.batch // tokens), dict[str, Callable[[], Any]](), dict[str, Any]()
    ids = torch.randint(BYTES, (rows, tokens + 1), device=given.device)

    def step(model: Model) -> None:
        loss_of(model, ids, given.device).backward()  # type: ignore[no-untyped-call]
        for each in model.parameters():
            each.grad = None

    for way in WAYS:
        run = functools.partial(step, model_of(way, *sizes).to(given.device))
        try:
            run()
            found[way], running[way] = {"peak_mib": peak_mib(run, given.device)}, run
        except Exception as broken:
            found[way] = {"failed": f"{type(broken).__name__}: {broken}"[:300]}
    for way, times in in_turns(running, given.rounds, 1, given.device).items():
        found[way] |= times
    return {"tokens": tokens, "batch": rows, "found": found}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--batch", type=int, default=32768, help="tokens")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--bytes", type=int, default=1 << 24, help="of texts to learn from, at most")
    given = parser.parse_args()
    sizes = 8, 512, 8
    if given.tiny:
        given.lengths, given.batch, given.steps, given.bytes, sizes = [64, 96], 128, 3, 1 << 16, (8, 32, 2)
    parameters = {way: sum(x.numel() for x in model_of(way, *sizes).parameters()) for way in WAYS}
    rows, results = list[dict[str, Any]](), list[dict[str, Any]]()

    def kept() -> None:
        keep(given, "hybrid language model", parameters=parameters, speed=rows, learned=results)

    for tokens in given.lengths:
        if not over(given):
            rows.append({"tokens": tokens} | attempt(functools.partial(timed, tokens, sizes, given)))
            kept()
    for seed in range(given.seeds):
        for way in WAYS:
            if not over(given):
                results.append({"way": way} | attempt(functools.partial(learned, way, sizes, seed, given)))
                told = results[-1]
                print(f"seed {seed}, {way}: {told.get('failed') or told['held_out']}", flush=True)
                kept()
    report(given, parameters, rows, results)


def report(
    given: argparse.Namespace, parameters: dict[str, int], rows: list[dict[str, Any]], results: list[dict[str, Any]]
) -> None:
    """Tables, and a plot beside the figures."""
    held = {way: [row["held_out"] for row in results if row["way"] == way and "held_out" in row] for way in WAYS}
    lines = [[way, parameters[way], statistics.fmean(held[way]) if held[way] else None, *held[way]] for way in WAYS]
    print(table(["layers", "parameters", "bits a byte, held out", *[f"seed {n}" for n in range(given.seeds)]], lines))
    sped = [[row["tokens"], *(row["found"][way].get("ms") for way in WAYS)] for row in rows if "found" in row]
    print(table(["tokens", *(f"{way}, ms" for way in WAYS)], sped))

    def series(what: str) -> dict[str, Any]:
        found = {}
        for way in WAYS:
            known = [(row["tokens"], row["found"][way].get(what)) for row in rows if "found" in row]
            pairs = [each for each in known if each[1]]
            if pairs:
                found[way] = [x for x, _ in pairs], [y for _, y in pairs]
        return found

    curves = {row["way"]: row["curve"] for row in results if row.get("seed") == 0}
    learning = {way: (list(range(len(each))), each) for way, each in curves.items()}
    titles = ("ms a step", series("ms")), ("MiB", series("peak_mib"))
    panels = [Panel(title, lines=lines, x="tokens") for title, lines in titles]
    draw(given.out, [*panels, Panel("bits a byte, seed 0", lines=learning, x="fiftieth of the steps")])


if __name__ == "__main__":
    main()
