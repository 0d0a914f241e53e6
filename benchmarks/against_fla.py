"""Linear, gated and delta-rule attention beside flash-linear-attention's kernels at the configs that its tuner finds.

    python benchmarks/against_fla.py --seconds 500 --out benchmarks/results/nvidia-h200/against_fla.json
    python benchmarks/against_fla.py --device cpu --tiny --out /tmp/tried.json          # no GPU, no fla: does it run?

B8 H16, causal, bf16, no state given; and a pack of ragged sequences. Rows are laid out (B, S, H, D), as a model's
projections make them and fla takes them; tilebook is given views of the same. First every kind and width compiles what
both want, side by side, fla's candidates without being timed. Then one process after the other has fla tune itself and
times the two, in turns, replayed from CUDA graphs, and eagerly where one cannot be captured. Outputs of both are
compared with chunks in fp32. fla's backward passes that it refuses to run here are said to be so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compare import rms_off, save
from race import Clock, quartiles, ratios

Given = dict[str, torch.Tensor]
Call = Callable[[Given], torch.Tensor]

KINDS = ("plain", "scalar decay", "channel decay", "delta rule")
WIDTHS, LENGTHS = (64, 128), (2048, 8192, 32768)
HEADS, TOKENS = 16, 1 << 18
PACKED, SHORTEST, LONGEST = 32768, 1 / 512, 1 / 8
"""Tokens of a pack, and what part of them its sequences have."""
_OFF = 2e-2
"""RMS error, relative to the RMS of the result, that either may have."""


def _lengths(tokens: int) -> list[int]:
    """Of a pack's sequences."""
    source, found = random.Random(0), list[int]()
    while sum(found) < tokens:
        found.append(min(source.randint(int(SHORTEST * tokens), int(LONGEST * tokens)), tokens - sum(found)))
    return found


def drawn(kind: str, width: int, length: int, how: argparse.Namespace) -> Given:
    """q, k, v, decays and β, (B, S, H, …); with a length of 0 a pack and where its sequences begin."""
    device, heads = how.device, how.heads
    lengths = [] if length else _lengths(how.packed)
    batch, tokens = (max(1, min(8, TOKENS // length)), length) if length else (1, sum(lengths))
    source = torch.Generator(device).manual_seed(0)

    def random_(*shape: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, *shape, generator=source, device=device)

    found = {name: random_(width).to(torch.bfloat16) for name in "qkv"}
    if kind == "delta rule":
        found |= {name: torch.nn.functional.normalize(found[name].float(), dim=-1).to(torch.bfloat16) for name in "qk"}
        found["beta"] = random_().sigmoid()
    if kind != "plain":
        found["g"] = torch.nn.functional.logsigmoid(random_(*[width] * (kind == "channel decay")) + 4)
    if lengths:
        found["cu_seqlens"] = torch.tensor([0, *lengths], device=device).cumsum(0)
    return found


def ours(kind: str) -> Call:
    import tilebook

    def call(given: Given) -> torch.Tensor:
        named = (given.get(name) for name in ("q", "k", "v", "g", "beta"))
        q, k, v, g, beta = (None if x is None else x.transpose(1, 2) for x in named)
        how = {"cu_seqlens": given["cu_seqlens"]} if "cu_seqlens" in given else {}
        if kind == "delta rule":
            o = tilebook.gated_delta_rule(q, k, v, g, beta, **how)
        else:
            o = tilebook.gated_linear_attention(q, k, v, g, **how)
        return o.transpose(1, 2)  # type: ignore[no-any-return]

    return call


def theirs(kind: str) -> Call:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    def call(given: Given) -> torch.Tensor:
        q, k, v, ends = given["q"], given["k"], given["v"], given.get("cu_seqlens")
        if kind == "delta rule":
            made = chunk_gated_delta_rule(q, k, v, given["g"], given["beta"], cu_seqlens=ends)
        else:
            run = chunk_gla if kind == "channel decay" else chunk_simple_gla
            made = run(q, k, v, given.get("g"), scale=q.shape[-1] ** -0.5, cu_seqlens=ends)
        return made[0]  # type: ignore[no-any-return]

    return call


def right(kind: str, given: Given) -> torch.Tensor:
    """By chunks in fp32, of the first sequence's first heads."""
    from tilebook.kernels.channel_decay import pytorch as channels
    from tilebook.kernels.delta_rule import pytorch as delta
    from tilebook.kernels.linear_attention import pytorch as linear

    end = int(given["cu_seqlens"][1]) if "cu_seqlens" in given else None
    named = ((name, given.get(name)) for name in ("q", "k", "v", "g", "beta"))
    q, k, v, g, beta = (None if x is None else x[:1, :end, :2].transpose(1, 2).float() for _, x in named)
    assert q is not None
    scale = q.shape[-1] ** -0.5
    if kind == "delta rule":
        o = delta.chunked(q, k, v, g, beta, None, scale, False)[0]  # type: ignore[arg-type]
    elif kind == "channel decay":
        o = channels.chunked(q, k, v, g, None, scale)[0]  # type: ignore[arg-type]
    else:
        o = linear.chunked(q, k, v, g, None, scale, False, 0.0)[0]  # type: ignore[arg-type]
    return o.transpose(1, 2)


def forward(call: Call) -> Callable[[Given], Any]:
    def run(given: Given) -> Any:
        with torch.no_grad():
            return call(given)

    return run


def training(call: Call) -> Callable[[Given], Any]:
    def run(given: Given) -> Any:
        leaves = [x for x in given.values() if x.requires_grad]
        return torch.autograd.grad(call(given), leaves, given["v"].detach())

    return run


def _error(call: Call, kind: str, given: Given) -> float:
    with torch.no_grad():
        truth = right(kind, given)
        found = call(given)[:1, : truth.shape[1], :2].float()
        return rms_off(found, truth)


def _untimed() -> None:
    """Triton's tuners run every candidate once, which compiles it, and time none."""
    from triton.runtime.autotuner import Autotuner

    def once(call: Callable[[], Any], quantiles: Any = None) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    Autotuner.do_bench = property(lambda self: once)  # type: ignore[method-assign, assignment]


def calls(kind: str, device: str) -> dict[str, Call]:
    if device == "cpu":
        return {"tilebook": ours(kind), "fla": ours(kind)}
    return {"tilebook": ours(kind), "fla": theirs(kind)}


def prepare(kind: str, width: int, given: argparse.Namespace) -> None:
    """Compiles what both run."""
    _untimed()
    for length in (2048, 0):
        made = drawn(kind, width, length, given)
        for call in calls(kind, given.device).values():
            for grads, how in ((False, forward), (True, training)):
                for name, x in made.items():
                    x.requires_grad_(grads and name != "cu_seqlens")
                try:
                    how(call)(made)
                except RuntimeError as refused:
                    print(str(refused)[:100], file=sys.stderr)


def timed(kind: str, width: int, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each length and pass."""
    clock, both = Clock(given.device, 0), calls(kind, given.device)
    for length in given.lengths:
        made = drawn(kind, width, length, given)
        row: dict[str, Any] = {"kind": kind, "D": width, "S": length, "B": made["q"].shape[0]}
        row["errors"] = errors = {name: round(_error(call, kind, made), 5) for name, call in both.items()}
        if errors["tilebook"] > _OFF:
            yield row | {"pass": "forward", "failed": "tilebook is wrong"}
            continue
        for name, how in (("forward", forward), ("training", training)):
            for each, x in made.items():
                x.requires_grad_(name == "training" and each != "cu_seqlens")
            steps: dict[str, Any] = {}
            found = row | {"pass": name}
            for who, call in both.items():
                try:
                    how(call)(made)
                    steps[who] = how(call)
                except RuntimeError as refused:
                    found[f"{who} failed"] = str(refused)[:160]
            if "tilebook" in steps:
                yield found | _ratio(clock, steps, made, given.rounds)
        del made


def _ratio(clock: Clock, steps: dict[str, Any], made: Given, rounds: int) -> dict[str, Any]:
    alone = "fla" not in steps
    running = steps if alone else {**steps, "again": steps["fla"]}
    series, mode = clock.replayed(running, [made], rounds), "graph"  # type: ignore[list-item]
    if set(series) != set(running):
        series, mode = clock.eager(running, [made], rounds), "eager"  # type: ignore[list-item]
    found: dict[str, Any] = {"mode": mode, "ms": {name: quartiles(times)[1] for name, times in series.items()}}
    if not alone:
        found["ratio"] = ratios(series["fla"], series["tilebook"])
        found["noise"] = ratios(series["fla"], series["again"])
    return found


def _run(task: str, kind: str, width: int, out: int) -> subprocess.Popen[str]:
    environment = os.environ | {"FLA_CACHE_RESULTS": "0", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--task", task, "--kind", kind, "--width", str(width)]
    return subprocess.Popen(command, stdout=out, text=True, env=environment)


def _waited(running: subprocess.Popen[str], until: float) -> None:
    try:
        running.wait(max(1.0, until - time.time()))
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def _told(row: dict[str, Any]) -> str:
    length = f"S{row['S']}" if row["S"] else "pack"
    name = f"{row['kind']} {length} D{row['D']} {row['pass']}"
    if "ratio" not in row:
        return f"{name}: {row.get('ms')} {row.get('failed') or row.get('fla failed')}"
    low, middle, high = row["ratio"]
    return f"{middle:.3f} ({low:.3f} … {high:.3f}; noise {row['noise'][1]:.3f})  {name}: {row['ms']} {row['errors']}"


def _means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each pass: geometric mean and worst."""
    found = {}
    for name in ("forward", "training"):
        values = [row["ratio"][1] for row in rows if "ratio" in row and row["pass"] == name]
        if values:
            mean = math.exp(math.fsum(map(math.log, values)) / len(values))
            found[name] = {"cells": len(values), "mean": round(mean, 3), "worst": min(values)}
    return found


def main() -> None:
    given = _arguments().parse_args()
    if given.tiny:
        given.widths, given.lengths, given.heads, given.rounds, given.packed = (16,), (96, 0), 2, 2, 1024
    if given.task == "prepare":
        return prepare(given.kind, given.width, given)
    if given.task == "time":
        for row in timed(given.kind, given.width, given):
            print(json.dumps(row), flush=True)
        return None
    from tilebook import device as devices

    until = time.time() + given.seconds
    groups = [(kind, width) for kind in given.kinds for width in given.widths]
    if given.device == "cuda" and not given.prepared:
        preparing = [_run("prepare", *group, subprocess.DEVNULL) for group in groups]
        for each in preparing:
            _waited(each, until - 0.6 * given.seconds)
        print(f"compiled {time.time() - until + given.seconds:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for group in groups:
        if time.time() > until - 10:
            break
        running = _run("time", *group, subprocess.PIPE)
        assert running.stdout is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda p=running, into=lines: into.extend(p.stdout), daemon=True)
        reader.start()
        _waited(running, until)
        reader.join(5)
        rows += [json.loads(line) for line in lines if line.startswith("{")]
        name = devices.current().name if given.device == "cuda" else "cpu"
        fla = devices.package_version("fla-core")
        save(given.out, "against fla", name, fla_core=fla, means=_means(rows), rounds=given.rounds, results=rows)
        print(f"{group} {time.time() - until + given.seconds:.0f} s", flush=True)
    for row in sorted(rows, key=lambda row: row.get("ratio", [0, 9, 0])[1]):
        print(_told(row))
    print(_means(rows))
    return None


def _arguments() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--seconds", type=float, default=600, help="stops by then with what it has")
    found.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    found.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    found.add_argument("--lengths", nargs="*", type=int, default=(*LENGTHS, 0), help="0 is a pack")
    found.add_argument("--rounds", type=int, default=9)
    found.add_argument("--heads", type=int, default=HEADS)
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    found.add_argument("--tiny", action="store_true", help="short sequences of two heads")
    found.add_argument("--prepared", action="store_true", help="all is compiled already")
    found.add_argument("--packed", type=int, default=PACKED, help="tokens of a pack")
    for hidden in ("--task", "--kind"):
        found.add_argument(hidden, help=argparse.SUPPRESS)
    found.add_argument("--width", type=int, help=argparse.SUPPRESS)
    return found


if __name__ == "__main__":
    main()
