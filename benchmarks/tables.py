"""The tables of what models and calls gain, in README.md and docs/speed.md, from the figures of three benchmarks.

    python benchmarks/tables.py             # prints them
    python benchmarks/tables.py --write     # puts them into the pages, after figures have changed

`e2e.json` and `train_steps.json` have whole models, `never_slower.json` single calls. A *way* is how a model is run:
plain, `TILEBOOK=1`, patched … Ratios are everywhere PyTorch's time over tilebook's, medians over rounds in which both
took turns. Only where the best plain way and tilebook's best were timed in different runs it is the quotient of two
medians, marked with ≈.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "nvidia-h200"

MODES = ("eager", "compiled")
WAYS = {
    "tilebook": "`TILEBOOK=1`",
    "attention": "`attn_implementation`",
    "packed": "packed",
    "patched": "patch",
    "loss head": "loss head",
    "by hand": "functions by hand",
}
SHOWN = {
    "Llama-like 4 × 2048": "4 Llama layers 4 × 2048, vocabulary 128,256",
    "Llama-like 4 × 2048, 32 heads": "4 Llama layers 4 × 2048, vocabulary 32,000",
    "Llama 1B 4 × 64 … 4096": "Llama 1B 4 × 64 … 4096, padded",
    "Gemma-2-like 2 × 4096": "8 Gemma-2 layers 2 × 4096",
    "Llama 1B, 256 after 8 × 1024": "Llama 1B, 256 tokens generated after 8 × 1024",
}
KINDS = {
    "forms": "unfused attention",
    "packed": "packed attention",
    "norms": "RMSNorm",
    "layer_norm": "LayerNorm",
    "mlp": "MLP",
    "decode": "decoding",
}
UNCHANGED = {("BERT-base", "patched"), ("BERT-base", "loss head"), ("GPT-2", "patched")}
"""Models in which `tilebook.patch` finds nothing to change, so that this way is `TILEBOOK=1` timed once more."""
DROPOUT = ("BERT-base", "GPT-2")
"""Models that train with dropout, as their configs have it."""
GENERATING = "Llama 1B, 256 after 8 × 1024"
"""Its "losses" are tokens."""

Row = dict[str, Any]
Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Timed:
    """One way of one model, in turns with plain PyTorch in the same mode. Times in ms, memory in MiB.

    apart: how far the first losses part from plain PyTorch's, as a part of its first; None where there are none.
    """

    model: str
    mode: str
    way: str
    plain_ms: float
    ms: float
    plain_mb: float
    mb: float
    ratio: Quartiles
    noise: Quartiles
    apart: float | None
    day: str
    commit: str

    @property
    def text(self) -> str:
        return SHOWN.get(self.model, self.model).replace(" × ", "×")


def load(name: str) -> Row:
    return json.loads((FIGURES / f"{name}.json").read_text())  # type: ignore[no-any-return]


def timed(document: Row) -> list[Timed]:
    """Every way that one of the two programs has timed, in the order of its rows; failed rows have none."""
    found = []
    for row in document["results"]:
        if "failed" in row:
            continue
        losses = row.get("first_losses", row.get("losses", {}))
        for way in row["ms"]:
            if way == "pytorch":
                continue
            ratios = row["ratio"]
            one, noise = (ratios[way], ratios["again"]) if isinstance(ratios, dict) else (ratios, row["noise"])
            known = row["model"] != GENERATING and way in losses
            found.append(
                Timed(
                    row["model"],
                    row["mode"].split(",")[0],
                    "by hand" if row.get("by_hand") else way,
                    row["ms"]["pytorch"],
                    row["ms"][way],
                    row["peak_mb"]["pytorch"],
                    row["peak_mb"][way],
                    tuple(one),
                    tuple(noise),
                    parted(losses["pytorch"], losses[way]) if known else None,
                    row.get("time", document["time"])[:10],
                    row.get("commit", document["commit"]),
                )
            )
    return found


def parted(plain: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(plain, other, strict=True)) / abs(plain[0])


def by_model(ways: list[Timed]) -> dict[str, list[Timed]]:
    """TILEBOOK=1 first, so that plain PyTorch's column is from the same run as its neighbour."""
    found: dict[str, list[Timed]] = {}
    for each in sorted(ways, key=lambda each: each.way != "tilebook"):
        if not any(each.model.startswith(model) and each.way == way for model, way in UNCHANGED):
            found.setdefault(each.model, []).append(each)
    return found


@dataclass(frozen=True)
class Gain:
    """What a model's best way with tilebook gains over its best way without; and which they are."""

    ways: list[Timed]

    @property
    def plain(self) -> Timed:
        return min((w for mode in MODES if (w := self.first(mode))), key=lambda each: each.plain_ms)

    @property
    def best(self) -> Timed:
        return min(self.ways, key=lambda each: each.ms)

    @property
    def in_turns(self) -> bool:
        return self.plain.mode == self.best.mode

    @property
    def value(self) -> float:
        return self.best.ratio[1] if self.in_turns else self.plain.plain_ms / self.best.ms

    def first(self, mode: str, way: str = "") -> Timed | None:
        return next((each for each in self.ways if each.mode == mode and way in ("", each.way)), None)

    def row(self) -> str:
        others = [each for each in self.ways if each.way != "tilebook"]
        other = min(others, key=lambda each: each.ms) if others else None
        cells = [self.ways[0].text]
        for mode in MODES:
            its = self.first(mode)
            cells.append(cell(its.plain_ms if its else None, its is self.plain))
        for mode in MODES:
            its = self.first(mode, "tilebook")
            cells.append(cell(its.ms if its else None, its is self.best))
        how = "" if other is None else f" {WAYS[other.way]}{', compiled' if other.mode == 'compiled' else ''}"
        cells.append(cell(other.ms if other else None, other is self.best) + how)
        cells.append(spread(self.best.ratio) if self.in_turns else f"≈ {self.value:.2f}")
        before = self.best if self.in_turns else self.plain
        cells.append(f"{gib(before.plain_mb)} → {gib(self.best.mb)}")
        return line(*cells)


def line(*cells: str) -> str:
    return f"|{'|'.join(cells)}|"


def cell(ms: float | None, compared: bool) -> str:
    text = "–" if ms is None else f"{ms:.1f}" if ms < 1000 else f"{ms:.0f}"
    return f"**{text}**" if compared else text


def spread(ratio: Quartiles) -> str:
    low, middle, high = ratio
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def gib(mb: float) -> str:
    return f"{mb / 1024:.1f}" if mb >= 1024 else f"{mb / 1024:.2f}"


def head(*names: str) -> list[str]:
    return [line(*names), "|" + "---|" * len(names)]


def where(document: Row) -> str:
    its = document["environment"]
    cudnn = divmod(int(its["cudnn"]), 10000)
    versions = f"PyTorch {its['torch']}, cuDNN {cudnn[0]}.{cudnn[1] // 100}, Triton {its['triton']}"
    return f"One {document['device']}, {versions}, Python {its['python']}, driver {its['driver']}"


def days(documents: list[Row]) -> str:
    found = [datetime.fromisoformat(row.get("time", d["time"])) for d in documents for row in d["results"]]
    first, last = (f"{day.day} {day:%B %Y}" for day in (min(found), max(found)))
    return first if first == last else f"{first} to {last}"


def measured(documents: list[Row]) -> str:
    """The card, the versions and the days of what these documents have."""
    return f"{'; '.join(sorted(set(map(where, documents))))}; {days(documents)}."


def models_table(documents: list[Row]) -> list[str]:
    """One line a model, the least gain first."""
    gains = [Gain(ways) for ways in by_model([each for d in documents for each in timed(d)]).values()]
    names = "PyTorch eager", "PyTorch compiled", "`TILEBOOK=1` eager", "`TILEBOOK=1` compiled"
    return [
        measured(documents),
        "",
        *head("ms", *names, "best other way", "speed-up", "memory, GiB"),
        *(gain.row() for gain in sorted(gains, key=lambda gain: gain.value)),
    ]


def ways_table(documents: list[Row]) -> list[str]:
    """One line for each way of each model, the least gain first."""
    ways = sorted((each for d in documents for each in timed(d)), key=lambda each: each.ratio[1])
    names = "PyTorch, ms", "tilebook, ms", "speed-up", "PyTorch to itself", "memory, GiB", "losses apart", "measured"
    return [
        measured(documents),
        "",
        *head("", "way", *names),
        *(
            line(
                each.text,
                f"{WAYS[each.way]}, {each.mode}",
                cell(each.plain_ms, False),
                cell(each.ms, False),
                spread(each.ratio),
                spread(each.noise),
                f"{gib(each.plain_mb)} → {gib(each.mb)}",
                "–" if each.apart is None else percent(each.apart),
                f"{each.day} {each.commit}",
            )
            for each in ways
        ),
    ]


def percent(part: float) -> str:
    return f"{100 * part:.1f} %" if part >= 0.0005 else "< 0.05 %"


def at_most(part: float | Timed) -> str:
    """A bound, so rounded up."""
    value = (part.apart or 0.0) if isinstance(part, Timed) else part
    return f"{math.ceil(round(1000 * value, 6)) / 10:.1f} %"


def losses_told(documents: list[Row]) -> list[str]:
    """How far the first losses part: without dropout, with it, and of plain PyTorch, eager and compiled."""
    ways = [each for d in documents for each in timed(d) if each.apart is not None]
    without = max((w for w in ways if not w.model.startswith(DROPOUT)), key=lambda each: each.apart or 0)
    told = [f"**Losses.** Without dropout the first losses part from plain PyTorch's by at most {at_most(without)}"]
    told[0] += f" of its first ({without.text}, {without.mode})."
    parts = []
    for model in DROPOUT:
        worst = max((w for w in ways if w.model.startswith(model)), key=lambda each: each.apart or 0)
        parts.append(f"{at_most(worst)} ({worst.text}, {worst.mode})")
    told.append(f"With dropout each copy drops other elements, and they part by up to {' and '.join(parts)}.")
    plain: dict[str, dict[str, list[float]]] = {}
    for row in (row for d in documents for row in d["results"] if row["model"].startswith(DROPOUT)):
        if "failed" not in row:
            plain.setdefault(row["model"], {}).setdefault(row["mode"], row["first_losses"]["pytorch"])
    far = {model: parted(*(its[mode] for mode in MODES)) for model, its in plain.items() if len(its) == len(MODES)}
    if far:
        model = max(far, key=lambda model: far[model])
        own = f"{at_most(far[model])} in {SHOWN.get(model, model).replace(' × ', '×')}"
        told.append(f"So do plain PyTorch's own, eager and compiled, by {own}.")
    return [" ".join(told)]


def named(group: str) -> str:
    """A class of calls in words: "drawn norms training" is "drawn RMSNorm, training"."""
    words = [KINDS.get(word, word) for word in group.split()]
    return group if group.startswith("all") else f"{' '.join(words[:-1])}, {words[-1]}"


def classes_table(document: Row, others: list[Row]) -> list[str]:
    """One line a class of calls, the one with the worst single call first. others: of whom readers know the card."""
    graph, eager = (document["classes"][mode] for mode in ("graph", "eager"))
    groups = sorted(
        {*graph, *eager}, key=lambda group: (min(c[group]["worst"] for c in (graph, eager) if group in c), group)
    )
    lines = []
    for group in groups:
        cells = [named(group), str(max(c[group]["cells"] for c in (graph, eager) if group in c))]
        for found in (graph, eager):
            its = found.get(group)
            cells += [f"{its[name]:.2f}" if its else "–" for name in ("worst", "mean", "noise")]
        lines.append(line(*cells))
    known = {where(document)} == set(map(where, others))
    told = f"The same card and versions; {days([document])}." if known else measured([document])
    told += f" {document['measured']:,} of {document['asked']:,} calls were measured."
    columns = [f"{name}{mode}" for mode in (", graph", ", eager") for name in ("worst", "mean", "noise")]
    return [told, "", *head("calls", "number", *columns), *lines]


def blocks() -> dict[str, list[str]]:
    """What stands between the marks of each name."""
    models = [load("e2e"), load("train_steps")]
    return {
        "models": models_table(models),
        "ways": ways_table(models),
        "losses": losses_told(models),
        "calls": classes_table(load("never_slower"), models),
    }


PAGES = {"README.md": ("models", "losses", "calls"), "docs/speed.md": ("ways", "losses")}


def filled(text: str, made: dict[str, list[str]]) -> str:
    """A page with what is between its marks replaced; ValueError for a name that nothing is made for."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in made:
            raise ValueError(f"nothing is made for the mark {match['name']}")
        return "\n".join([match["begin"], *made[match["name"]], match["end"]])

    marks = re.compile(r"(?P<begin><!-- tables\.py: (?P<name>\w+) -->)\n.*?(?P<end><!-- end -->)", re.DOTALL)
    return marks.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md and docs/speed.md, between their marks")
    given, made = parser.parse_args(), blocks()
    for page in PAGES if given.write else ():
        path = ROOT / page
        path.write_text(filled(path.read_text(), made))
    if not given.write:
        print("\n\n".join("\n".join(lines) for lines in made.values()))


if __name__ == "__main__":
    main()
