"""DistilBERT with exact, linear and alternating attention, over lengths: time, memory and accuracy.

    python benchmarks/papers/distilbert_linear.py --out benchmarks/results/nvidia-h200/papers/distilbert_linear.json
    python benchmarks/papers/distilbert_linear.py --device cpu --tiny --out /tmp/tried.json     # no GPU, no figures

The study replaced attention by Performer's 64 random features, in all layers or in every other one, and was neither
faster nor smaller: batches of 16 × 256 tokens, three epochs. Here attention is written out ("pytorch"), PyTorch's
fused one, tilebook's, Performer's in all layers, in every other one beside tilebook's exact attention, and elu + 1.
Steps are timed in turns, padded, with positions for as many tokens as there are. Then each learns from random weights,
reviews of films with --data, else joined texts of packages: at the first of `--lengths` from all seeds, at the others
from the first one.
"""

from __future__ import annotations

import argparse
from typing import Any

from beside import apart, attempt, keep, over, table
from distilbert import STUDY, Way, case_of, chosen, learned, options, shown, speed

import tilebook
from tilebook.report.plots import Panel, draw

WAYS = {
    "pytorch": Way("eager"),
    "sdpa": Way("sdpa"),
    "tilebook": Way("tilebook"),
    "Performer": Way("sdpa", linear={"feature_map": "performer"}),
    "hybrid": Way("tilebook", linear={"feature_map": "performer", "exact_every": 2}),
    "elu+1": Way("sdpa", linear={"feature_map": "elu+1"}),
}

LENGTHS = (256, 128, 384, 512, 1024, 2048)
TINY = (1024,)


def ablation(rows: list[dict[str, Any]], found: dict[int, dict[str, list[float]]]) -> str:
    """One line for each way and length."""
    lines: list[list[Any]] = []
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if "failed" in row:
            lines.append([row["tokens"], row["failed"], None, None, None, None])
            continue
        for way, ms in row["ms"].items():
            ratio = row["ratio"].get(way, [None, 1.0])[1]
            accuracy = found.get(row["tokens"], {}).get(way, [None])[0]
            lines.append([row["tokens"], way, ms, row["peak_mb"][way], ratio, accuracy])
    return table(["tokens", "attention", "ms", "MB", "pytorch's time over it", "first seed's accuracy, %"], lines)


def study(given: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[int, Any], dict[int, Any], str]:
    """Rows of speed, accuracies and costs by length and way, and what was learned."""
    rows, found, costs, name = list[dict[str, Any]](), dict[int, Any](), dict[int, Any](), ""

    def kept() -> None:
        accuracies = {n: apart(each, {}) for n, each in found.items()}
        keep(given, "linear DistilBERT", study=STUDY, texts=name, speed=rows, costs=costs, accuracy=accuracies)

    lengths = TINY if given.tiny else given.lengths
    for tokens in lengths:
        if not over(given):
            case = case_of(given.batch, tokens, padded=True)
            tried = attempt(lambda case=case: speed(case, WAYS, given.rounds, given.device, given.tiny))
            rows.append({"case": f"{given.batch} × {tokens}", "tokens": tokens} | tried)
            kept()
    for seed in range(given.seeds):
        for tokens in lengths if not seed else lengths[:1]:
            told, case = chosen(given, tokens, joined=True), case_of(given.batch, tokens)
            name = told.name
            for way, how in WAYS.items():
                if over(given):
                    return rows, found, costs, name
                tried = attempt(
                    lambda case=case, how=how, told=told, seed=seed: {"is": learned(case, how, told, seed, given)}
                )
                if "failed" in tried:
                    print(f"{tokens} tokens, {way}: {tried['failed']}", flush=True)
                    if way == "pytorch":
                        break  # nothing to be beside
                    continue
                accuracy, seconds, memory = tried["is"]
                found.setdefault(tokens, {}).setdefault(way, []).append(accuracy)
                costs.setdefault(tokens, {}).setdefault(way, []).append((seconds, memory))
                print(f"seed {seed}, {tokens} tokens, {way}: {accuracy:.2f} % after {seconds:.1f} s", flush=True)
                kept()
    return rows, found, costs, name


def main() -> None:
    parser = options(__doc__, 3, 5e-5)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="the study's own first")
    given = parser.parse_args()
    tilebook.register_transformers()
    rows, found, costs, name = study(given)
    first = next(iter(found), 0)
    accuracies = apart(found.get(first, {}), {})
    print(shown([row for row in rows if row["tokens"] == first], accuracies, costs.get(first, {}), name))
    print(ablation(rows, found))
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: row["tokens"])
    lengths = [row["tokens"] for row in timed]

    def lines(what: str) -> dict[str, Any]:
        series = {way: [row[what][way] for row in timed] for way in WAYS}
        return {way: (lengths, each) for way, each in series.items() if all(each)}

    draw(
        given.out,
        [
            Panel("ms a step", lines=lines("ms"), x="tokens"),
            Panel("MB", lines=lines("peak_mb"), x="tokens"),
            Panel(f"{name}: accuracy, %", bars={row["way"]: row["mean"] for row in accuracies}),
        ],
    )


if __name__ == "__main__":
    main()
