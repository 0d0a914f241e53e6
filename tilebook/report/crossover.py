"""From which length on windows and linear attention take less time than exact attention, measured on this GPU."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import tilebook
from tilebook.kernels.bidirectional.form import PERFORMER
from tilebook.report.plots import Panel
from tilebook.tuner.judge.turns import in_turns, peak_mib

EXACT = "exact"
TOKENS = 1 << 15
"""Of a batch on a GPU, as long as the sequence is shorter."""
_CALLS = 10

Row = dict[str, Any]


def contenders(window: int) -> dict[str, Callable[..., Any]]:
    """Name → causal attention of q, k, v and log-decays."""
    return {
        EXACT: lambda q, k, v, g: tilebook.attention(q, k, v, causal=True),
        f"window {window}": lambda q, k, v, g: tilebook.attention(q, k, v, causal=True, window=(window - 1, 0)),
        "linear": lambda q, k, v, g: tilebook.linear_attention(q, k, v, causal=True),
        "gated": lambda q, k, v, g: tilebook.gated_linear_attention(q, k, v, g),
        PERFORMER: lambda q, k, v, g: tilebook.linear_attention(q, k, v, feature_map=PERFORMER, causal=True),
    }


def measured(
    lengths: Sequence[int], head_dims: Sequence[int], heads: int, window: int, device: str, rounds: int
) -> Iterator[Row]:
    """One row for each head dimension, length and direction, the shortest first."""
    for width, n, backward in itertools.product(head_dims, sorted(lengths), (False, True)):
        tensors, do = _drawn(n, width, heads, device)
        running, found = dict[str, Callable[[], Any]](), dict[str, Row]()
        for name, function in contenders(window).items():
            run = functools.partial(_once, function, tensors, do if backward else None)
            try:
                run()
                found[name] = {"peak_mib": peak_mib(run, device)}
                running[name] = run
            except Exception as broken:
                found[name] = {"failed": f"{type(broken).__name__}: {broken}"[:300]}
        calls = max(1, min(_CALLS, TOKENS // n))
        for name, times in in_turns(running, rounds, calls, device).items():
            found[name] |= times
        direction = "with gradients" if backward else "forward"
        yield {"head_dim": width, "tokens": n, "batch": len(do), "direction": direction, "found": found}


def _drawn(n: int, width: int, heads: int, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and log-decays as views of (B, S, H, D), as projections give them, and a gradient of the output."""
    source = torch.Generator(device).manual_seed(0)
    batch = max(1, TOKENS // n) if device == "cuda" else 1
    draw = functools.partial(torch.randn, batch, n, heads, generator=source, device=device)
    q, k, v, do = (draw(width).to(torch.bfloat16).transpose(1, 2) for _ in range(4))
    g = F.logsigmoid(draw() + 4).transpose(1, 2)
    return [x.requires_grad_() for x in (q, k, v, g)], do


def _once(function: Callable[..., Any], tensors: list[torch.Tensor], do: torch.Tensor | None) -> Any:
    if do is None:
        with torch.no_grad():
            return function(*tensors)
    return torch.autograd.grad(function(*tensors), tensors, do, allow_unused=True)


def crossing(points: Iterable[tuple[int, float]]) -> float | None:
    """Of lengths, and how often exact attention's time holds another's, the length from which on that is the shorter.

    Between two lengths ratios are taken for a power of the length. The shortest length where it always is, None where
    it is not at the longest.
    """
    ordered = sorted(points)
    behind = [i for i, (_, ratio) in enumerate(ordered) if ratio < 1]
    if not ordered or (behind and behind[-1] == len(ordered) - 1):
        return None
    if not behind:
        return float(ordered[0][0])
    (low, before), (high, after) = ordered[behind[-1]], ordered[behind[-1] + 1]
    return float(low * (high / low) ** (math.log(before) / (math.log(before) - math.log(after))))


def crossovers(rows: Sequence[Row]) -> list[Row]:
    """By head dimension and direction, of each contender."""
    found = []
    for (width, direction), group in _groups(rows):
        names = [name for name in group[0]["found"] if name != EXACT]
        lengths = {
            name: crossing((row["tokens"], exact / other) for row, (exact, other) in _both(group, "ms", name))
            for name in names
        }
        found.append({"head_dim": width, "direction": direction, "tokens": lengths})
    return found


def _groups(rows: Sequence[Row]) -> Iterator[tuple[tuple[int, str], list[Row]]]:
    def key(row: Row) -> tuple[int, str]:
        return row["head_dim"], row["direction"]

    for which, group in itertools.groupby(sorted(rows, key=key), key):
        yield which, list(group)


def _both(group: list[Row], what: str, name: str) -> Iterator[tuple[Row, tuple[float, float]]]:
    """Rows in which exact attention has that figure and so has the other, and the two."""
    for row in group:
        exact, other = (row["found"][each].get(what) for each in (EXACT, name))
        if exact and other:
            yield row, (exact, other)


def line(row: Row) -> str:
    def told(each: Row) -> str:
        memory = f" {each['peak_mib']} MiB" if each.get("peak_mib") is not None else ""
        return each["failed"] if "failed" in each else f"{each['ms']:.4g} ms{memory}"

    figures = "; ".join(f"{name} {told(each)}" for name, each in row["found"].items())
    return f"B{row['batch']},S{row['tokens']},D{row['head_dim']} {row['direction']}: {figures}"


def text(rows: Sequence[Row]) -> str:
    """From how many tokens on each is faster than exact attention."""
    if not rows:
        return "nothing was measured"
    shortest, longest = min(row["tokens"] for row in rows), max(row["tokens"] for row in rows)
    lines = ["faster than exact attention from so many tokens on:"]
    for each in crossovers(rows):
        for name, tokens in each["tokens"].items():
            told = f"not up to {longest}" if tokens is None else f"{tokens:.0f}"
            told += ", the shortest" if tokens == shortest else ""
            lines.append(f"  head dim {each['head_dim']}, {each['direction']}, {name}: {told}")
    return "\n".join(lines)


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Time and memory against the length."""
    found = []
    for (width, direction), group in _groups(rows):
        for what, unit in (("ms", "ms"), ("peak_mib", "MiB")):
            lines: dict[str, tuple[list[float], list[float]]] = {}
            for name in group[0]["found"]:
                pairs = [pair for pair in ((row["tokens"], row["found"][name].get(what)) for row in group) if pair[1]]
                if pairs:
                    lines[name] = [x for x, _ in pairs], [y for _, y in pairs]
            found.append(Panel(f"head dim {width}, {direction}: {unit}", lines=dict(lines), x="tokens"))
    return found
