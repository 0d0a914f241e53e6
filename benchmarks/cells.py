"""What is compared, as plain numbers: a call's shape, form and pass, so that a process can make it without tilebook."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

SUITES = ("models", "fa", "seeds")
KINDS = ("attention", "mlp", "norms", "layer_norm", "decode", "forms", "packed")

_OP = {
    "attention_fwd": "attention",
    "mlp_up_fwd": "mlp",
    "rms_norm_fwd": "norms",
    "layer_norm_fwd": "layer_norm",
    "attention_decode": "decode",
    "attention_varlen_fwd": "packed",
}
"""The op whose suites pose the calls of a kind. Attention that PyTorch fuses no kernel for is of the kind "forms"."""

DRAWN = {kind: op for op, kind in _OP.items() if kind in ("attention", "mlp", "norms")}
"""Kinds of which problems are drawn, and the op that poses them."""

_LEAST_TRAINED_ROWS = 256


@dataclass(frozen=True)
class Cell:
    """One call. `step`: "forward", or "training" for forward and backward. `source`: the suite it is of, or "drawn"."""

    kind: str
    step: str
    source: str
    label: str
    dtype: str
    sizes: dict[str, Any] = field(hash=False)

    @property
    def name(self) -> str:
        return f"{self.kind} {self.step} {self.label} {self.dtype}"

    @property
    def group(self) -> str:
        drawn = "drawn " if self.source == "drawn" else ""
        return f"{drawn}{self.kind} {self.step}"

    def json(self) -> dict[str, Any]:
        return asdict(self)


def _attention(problem: Any) -> dict[str, Any]:
    form = problem.form
    bias = re.fullmatch(r"d?(mask|bias)(b?h?q?k?)", problem.bias)
    kind, axes = bias.groups() if bias else ("", "")
    names = ("batch", "heads", "heads_kv", "seq_q", "seq_k", "head_dim")
    return {
        **{name: getattr(problem, name) for name in names},
        "causal": bool(form.causal),
        "left": form.left,
        "right": form.right,
        "softcap": 50.0 if problem.softcap else 0.0,
        "bias": kind,
        "axes": axes,
        "alibi": bool(problem.alibi),
    }


def _sizes(kind: str, problem: Any) -> dict[str, Any]:
    if kind == "attention":
        return _attention(problem)
    if kind == "mlp":
        return {name: getattr(problem, name) for name in ("rows", "width", "inner", "activation")}
    if kind in ("norms", "layer_norm"):
        return {name: getattr(problem, name) for name in ("rows", "width", "vectors")}
    names = ("heads", "heads_kv", "head_dim")
    found = {name: getattr(problem, name) for name in names}
    if kind == "decode":
        reach = problem.window if problem.window < problem.seq_k else 0
        return {**found, "batch": problem.batch, "seq_q": problem.seq_q, "seq_k": problem.seq_k, "window": reach}
    lengths_q, lengths_k = problem.lengths(0)
    return {**found, "lengths_q": lengths_q, "lengths_k": lengths_k, "causal": bool(problem.form.right == 0)}


def _takes(kind: str, problem: Any) -> bool:
    """Is it a call that this program knows how to make? It leaves out dropout, tf32 and caches in pages."""
    if kind == "attention":
        return not (problem.dropout or problem.tf32)
    if kind == "decode":
        return problem.cache == "contiguous" and not problem.ragged and problem.seq_q == 1 and not problem.capped
    return kind != "packed" or not (problem.softcap or problem.window or problem.tf32)


def _of(kind: str, problem: Any, source: str) -> Iterator[Cell]:
    sizes = _sizes(kind, problem)
    composed = kind == "attention" and (
        problem.bias or problem.window or problem.softcap or problem.alibi or problem.diagonal != "top_left"
    )
    named = "forms" if composed else kind
    yield Cell(named, "forward", source, problem.label, problem.dtype, sizes)
    if kind != "decode" and not (kind == "mlp" and problem.rows < _LEAST_TRAINED_ROWS):
        yield Cell(named, "training", source, problem.label, problem.dtype, sizes)


def of_suites() -> list[Cell]:
    """The calls that the suites pose, each once; packs from a suite of their own."""
    from tilebook import op as ops

    found: dict[str, Cell] = {}
    for name, kind in _OP.items():
        suites = ops.get(name).problem.suites()
        for suite in ("varlen",) if kind == "packed" else SUITES:
            for problem in suites.get(suite, ()):
                for cell in _of(kind, problem, suite) if _takes(kind, problem) else ():
                    found.setdefault(cell.name, cell)
    return list(found.values())


def drawn(seed: int, count: int) -> list[Cell]:
    """Calls from the same ranges that no suite has: `count` problems, the same for the same seed."""
    from tilebook import op as ops

    source, found = random.Random(f"never slower {seed}"), dict[str, Cell]()
    posed = {
        kind: {(p.label, p.dtype) for problems in ops.get(op).problem.suites().values() for p in problems}
        for op, kind in _OP.items()
    }
    problems = 0
    while problems < count:
        kind, name = list(DRAWN.items())[problems % len(DRAWN)]
        dtype = "fp16" if source.random() < 0.2 else "bf16"
        problem = ops.get(name).problem.parse(_DRAW[kind](source), dtype)
        if (problem.label, dtype) in posed[kind]:
            continue
        posed[kind].add((problem.label, dtype))
        problems += 1
        for cell in _of(kind, problem, "drawn"):
            found[cell.name] = cell
    return list(found.values())


def _between(source: random.Random, low: int, high: int) -> int:
    """Whole numbers, as often in one octave as in another."""
    return round(math.exp(source.uniform(math.log(low), math.log(high))))


def _drawn_attention(source: random.Random) -> str:
    head_dim = source.choice((64, 64, 64, 128, 128, 128, 80, 96, 256))
    heads_kv, group = source.choice((1, 2, 4, 6, 8, 12, 16)), source.choice((1, 1, 2, 4, 8))
    length = _between(source, 64, 16384)
    if source.random() < 0.5:  # half of them lengths as programs pad them
        length = max(64, length // 64 * 64)
    tokens = _between(source, max(length, 1024), 32768)
    heads_kv = max(1, min(heads_kv, 8192 // (head_dim * group)))
    text = f"B{max(1, tokens // length)},H{heads_kv * group},Hkv{heads_kv},S{length},D{head_dim}"
    return text + (",causal" if source.random() < 0.5 else "")


def _drawn_mlp(source: random.Random) -> str:
    width = source.choice((384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 2048, 2560, 3072, 4096))
    inner = width * source.choice((2, 3, 4, 4, 4))
    form = source.choice(("", "", ",gelu_tanh", ",gelu_tanh", ",relu"))
    return f"M{_between(source, 1, 16384)},H{width},I{inner}{form}"


def _drawn_norm(source: random.Random) -> str:
    return f"M{_between(source, 1, 65536)},N{64 * _between(source, 2, 128)}"


_DRAW = {"attention": _drawn_attention, "mlp": _drawn_mlp, "norms": _drawn_norm}


def tiny(cells: Iterable[Cell]) -> list[Cell]:
    """The same forms at sizes that a CPU computes at once."""
    limits = {"batch": 2, "seq_q": 40, "seq_k": 48, "head_dim": 16, "rows": 24, "width": 32, "inner": 64, "window": 20}
    found: dict[str, Cell] = {}
    for cell in cells:
        sizes = {name: min(n, limits[name]) if name in limits else n for name, n in cell.sizes.items()}
        if "heads" in sizes:
            sizes |= {"heads": 2 * min(2, sizes["heads"] // sizes["heads_kv"]), "heads_kv": 2}
        if cell.kind in ("attention", "forms") and cell.sizes["seq_q"] == cell.sizes["seq_k"]:
            sizes["seq_k"] = sizes["seq_q"]
        sizes |= {side: min(sizes[side], 9) for side in ("left", "right") if side in sizes}
        if cell.kind == "packed":
            sizes |= {name: [7, 1, 20] for name in ("lengths_q", "lengths_k")}
        # What stays different from cell to cell names them apart.
        shown = ",".join(f"{name} {value}" for name, value in sizes.items() if value)
        made = Cell(cell.kind, cell.step, cell.source, shown, cell.dtype, sizes)
        found.setdefault(made.name, made)
    return list(found.values())
