"""How soon a search finds the fastest config: ours and others, replayed over recorded sweeps. Needs no GPU.

    cd benchmarks/results/nvidia-h200 && python ../../search.py sweeps/*.jsonl --out search

writes search.json and search.png. Sweeps recorded after the search's constants got their values are marked as held
out. `tilebook` is a whole tuning session as a user has it: its seeds are the default and, from the registry that comes
with the package, the winners of the nearest problems, without the sweep's own and those that differ from it only in
batch or heads. Beside it

    default only     the same session with the default as its only seed
    random           configs of the space in a random order, compiled and measured as ours are
    grid             the same in the order of the axes
    plain TPE        Optuna's TPESampler as it comes, one ask and tell after the other: it proposes what is infeasible
                     and what it has measured before, and the GPU waits for the compiler
    triton.autotune  every config in turn, compiled, then timed for `do_bench`'s 125 ms; nothing is verified

Time is simulated, from recorded compile and measuring times, for one GPU and 16 compilers. Configs are counted in
the order in which they are asked for: what was found by n is what `--trials n` finds before it looks around the best.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from tilebook.op import Config
from tilebook.tuner.process.runner import Candidate
from tilebook.tuner.search import INFEASIBLE_MS
from tilebook.tuner.session import Options
from tilebook.tuner.sweeps.recorded import (
    Machine,
    Step,
    beginning,
    default,
    neighbours,
    recorded_op,
    todays_default,
    tune,
)
from tilebook.tuner.sweeps.sweep import Measured, Sweep, read

SHARES = (0.15, 0.30)
"""Shares of the configs at which the methods are compared."""

FIXED = datetime(2026, 11, 21, 20, 10, tzinfo=UTC)
"""When the search's constants got their values: sweeps of a later date had no part in choosing them."""

PROPOSALS = 200  # of plain TPE, most of which are infeasible where the space is large
POINTS = 80  # of a curve in the figure
DO_BENCH_S = 0.125
IN_FLIGHT = 32  # candidates that a session keeps with 16 compilers

Method = Callable[[Sweep, int], list[Step]]


def tilebook(sweep: Sweep, seed: int) -> list[Step]:
    return tune(sweep, Options(seed=seed, force=True), verdicts=neighbours(sweep))[1].steps


def default_only(sweep: Sweep, seed: int) -> list[Step]:
    return tune(sweep, Options(seed=seed, force=True))[1].steps


def in_order(sweep: Sweep, configs: Iterable[Config]) -> list[Step]:
    """These configs, compiled ahead and measured in the order in which they are ready."""
    machine, waiting, left = Machine(sweep), {}, iter(configs)
    while True:
        for config in left:
            candidate = Candidate(sweep.implementation, config)
            waiting[machine.submit("", sweep.implementation, "", config)] = candidate
            if len(waiting) == IN_FLIGHT:
                break
        if not waiting:
            return machine.steps
        done = machine.wait(waiting, 1.0)
        for future in [each for each in waiting if each in done]:
            candidate = waiting.pop(future)
            if future.result().failure is None:
                machine.attempt(candidate, None)


def configs(sweep: Sweep) -> list[Config]:
    return sorted((each.candidate.config for each in sweep.ours), key=lambda config: config.key)


def at_random(sweep: Sweep, seed: int) -> list[Step]:
    return in_order(sweep, random.Random(seed).sample(configs(sweep), len(configs(sweep))))


def grid(sweep: Sweep, seed: int) -> list[Step]:
    del seed
    known = frozenset(configs(sweep))
    return in_order(sweep, (config for config in recorded_op(sweep).tunable.space.configs() if config in known))


def plain_tpe(sweep: Sweep, seed: int) -> list[Step]:
    machine, steps = Machine(sweep), list[Step]()
    axes = {axis: values for axis, values in sweep.header["axes"].items() if len(values) > 1}
    fixed = {axis: values[0] for axis, values in sweep.header["axes"].items() if len(values) == 1}
    known = {each.candidate.config: each for each in sweep.ours}
    compiled: set[Config] = set()
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(PROPOSALS):
        trial = study.ask()
        values = {axis: axes[axis][trial.suggest_int(axis, 0, len(axes[axis]) - 1)] for axis in axes}
        config = Config({axis: (values | fixed)[axis] for axis in sweep.header["axes"]})
        time_ms, ran = INFEASIBLE_MS, False
        if config in known:
            if config not in compiled:
                future = machine.submit("", sweep.implementation, "", config)
                machine.wait([future], 1.0)
                future.result()
                compiled.add(config)
            if known[config].compiled.failure is None:
                attempt = machine.attempt(known[config].candidate, None)
                if attempt.failure is None:
                    time_ms, ran = attempt.time_ms, True
            steps.append(Step(machine.now, len(steps) + 1, time_ms if ran else float("inf")))
        study.tell(trial, time_ms)
    return steps


def autotune(sweep: Sweep, seed: int) -> list[Step]:
    steps, now = list[Step](), 0.0
    measured = {each.candidate.config: each for each in sweep.ours}
    for config in recorded_op(sweep).tunable.space.configs():
        if config in measured:
            each = measured[config]
            now += each.compiled.seconds + DO_BENCH_S
            steps.append(Step(now, len(steps) + 1, passed_ms(each)))
    return steps


METHODS: dict[str, Method] = {
    "tilebook": tilebook,
    "default only": default_only,
    "random": at_random,
    "grid": grid,
    "plain TPE": plain_tpe,
    "triton.autotune": autotune,
}
SEEDLESS = ("grid", "triton.autotune")
OURS = ("tilebook", "default only")


def best_by(steps: Sequence[Step], axis: str, points: np.ndarray) -> np.ndarray:
    """The best time so far at each of these counts of configs ("number") or seconds; infinite before the first."""
    ordered = sorted(steps, key=lambda step: float(getattr(step, axis)))
    best = np.minimum.accumulate([np.inf, *(step.time_ms for step in ordered)])
    return best[np.searchsorted([getattr(step, axis) for step in ordered], points, side="right")]


def passed_ms(measured: Measured) -> float:
    """The config's time; infinite where it failed."""
    time_ms = measured.attempt.time_ms
    return float("inf") if measured.attempt.failure is not None or time_ms is None else time_ms


def drawn(times_ms: Sequence[float]) -> np.ndarray:
    """The best of 1, 2, … configs drawn from those with these times, ms, in the median of all orders."""
    times, count = np.sort(times_ms), len(times_ms)
    missed, ranks = np.ones(count), np.arange(count)  # the probability that none of n is of this rank or better
    found = []
    for n in range(count):
        missed = missed * np.maximum(count - 1 - ranks - n, 0) / (count - n)
        found.append(times[np.argmax(missed <= 0.5)])
    return np.array(found)


def chance(sweep: Sweep, first: Sequence[Config]) -> np.ndarray:
    """What a random search has found after 1, 2, … configs in the median of all orders, ms: the better, at each count,
    of one that draws all of its configs and one that begins with `first`, in this order, as ours does."""
    times = {each.candidate.config: passed_ms(each) for each in sweep.ours}
    begun = np.minimum.accumulate([times[config] for config in first])
    then = drawn([time_ms for config, time_ms in times.items() if config not in first])
    return np.minimum(drawn([*times.values()]), np.concatenate([begun, np.minimum(begun[-1], then)]))


def clear(runs: int) -> int:
    """How many of so many runs must be worse than the median of chance until luck explains it in under 5 % of cases."""
    ways = [math.comb(runs, worse) for worse in range(runs + 1)]
    return next(worse for worse in range(runs + 1) if sum(ways[worse:]) < 0.05 * 2**runs)


def behind(runs: Sequence[list[Step]], random: Sequence[list[Step]], luck: np.ndarray) -> dict[str, Any]:
    """Where these are behind `luck`, ms after 1, 2, … configs: after which counts of configs in the median, by how much
    at most, and after which by more than luck; and until which second they are behind these random ones."""
    tried = np.arange(1, len(luck) + 1)
    found = np.array([best_by(steps, "number", tried) for steps in runs])
    lag = np.median(found, axis=0) / luck - 1
    surely = (found > luck).sum(axis=0) >= clear(len(runs))
    ends_s = float(np.median([max(step.seconds for step in steps) for steps in runs]))
    every = np.linspace(0, ends_s, 20 * POINTS + 1)[1:]
    by_s, random_by_s = (
        np.median([best_by(steps, "seconds", every) for steps in each], axis=0) for each in (runs, random)
    )
    late = every[by_s > random_by_s]
    return {
        "at": [int(n) for n in tried[lag > 0]],
        "surely_at": [int(n) for n in tried[surely]],
        "most": round(max(0.0, float(lag.max())), 5),
        "until_s": round(float(late[-1]), 2) if len(late) else None,
    }


def behind_random(
    sweep: Sweep, runs: Mapping[str, Sequence[list[Step]]], first: Mapping[str, Sequence[Config]]
) -> dict[str, Any]:
    """Where ours, which begin with these configs, are behind chance; and where random itself is, judged in this way."""
    ends = {name: int(np.median([max(step.number for step in steps) for steps in runs[name]])) for name in first}
    lags = {
        name: {"seeds": len(begun), **behind(runs[name], runs["random"], chance(sweep, begun)[: ends[name]])}
        for name, begun in first.items()
    }
    alone = drawn([passed_ms(each) for each in sweep.ours])[: max(ends.values())]
    return {**lags, "random": {"seeds": 0, **behind(runs["random"], runs["random"], alone)}}


def judge(path: Path, seeds: int) -> dict[str, Any]:
    """Every method on one sweep: shares of the exhaustive best, as medians and quartiles over the seeds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = read(path)
    count = len(sweep.ours)
    exhaustive = min(map(passed_ms, sweep.ours))
    first = {"tilebook": beginning(sweep, neighbours(sweep)), "default only": (default(sweep),)}
    alone = first["tilebook"] == first["default only"]
    runs: dict[str, list[list[Step]]] = {}
    for name, method in METHODS.items():
        same = name == "default only" and alone  # there is no neighbour to learn from
        every = range(1 if name in SEEDLESS else seeds)
        runs[name] = runs["tilebook"] if same else [method(sweep, seed) for seed in every]
    longest = max(steps[-1].seconds for steps in [*runs["tilebook"], *runs["random"]])
    seconds = np.linspace(0, longest, POINTS + 1)[1:]

    def quartiles(name: str, axis: str, points: np.ndarray) -> list[list[float]]:
        shares = np.array([exhaustive / best_by(steps, axis, points) for steps in runs[name]])
        return [[round(float(v), 5) for v in row] for row in np.percentile(shares, [25, 50, 75], axis=0).T]

    thinned = np.unique(np.linspace(1, count, POINTS).astype(int))
    methods = {}
    for name, found in runs.items():
        # plain TPE may have proposed nothing feasible
        ends = [max((step.seconds for step in steps), default=0.0) for steps in found]
        tries = [max((step.number for step in steps), default=0) for steps in found]
        best = [min((step.time_ms for step in steps), default=float("inf")) for steps in found]
        methods[name] = {
            "share_of_best": {
                f"{share:.0%}": quartiles(name, "number", np.array([int(share * count)]))[0] for share in SHARES
            },
            "by_tried": [[int(n), *row] for n, row in zip(thinned, quartiles(name, "number", thinned), strict=True)],
            "by_seconds": [
                [round(float(s), 2), *row] for s, row in zip(seconds, quartiles(name, "seconds", seconds), strict=True)
            ],
            "configs": float(np.median(tries)),
            "seconds": round(float(np.median(ends)), 2),
            "end": [float(q) for q in np.percentile([exhaustive / ms for ms in best], [25, 50, 75])],
        }
    (whole,) = runs["triton.autotune"]
    fifth = np.array([whole[-1].seconds / 5])
    in_a_fifth = [exhaustive / best_by(steps, "seconds", fifth)[0] for steps in runs["tilebook"]]
    return {
        "op": sweep.header["op"],
        "problem": sweep.header["label"],
        "whole": sweep.header["whole"],
        "feasible": sweep.header["feasible"],
        "configs": count,
        "exhaustive_best_ms": exhaustive,
        "recorded": sweep.header["created_at"],
        "held_out": datetime.fromisoformat(sweep.header["created_at"]) > FIXED,
        "default": dict(default(sweep)),
        "default_of_today": default(sweep) == todays_default(sweep),
        "default_share_of_best": round(exhaustive / default_ms(sweep), 5),
        "behind_random": behind_random(sweep, runs, first),
        "in_a_fifth_of_autotune": round(float(np.median(in_a_fifth)), 5),
        "methods": methods,
    }


def default_ms(sweep: Sweep) -> float:
    first = default(sweep)
    return next(passed_ms(each) for each in sweep.ours if each.candidate.config == first)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The page's table, as Markdown: the sweeps that the search was made on, then those held out."""
    shown = (*OURS, "random", "plain TPE", "grid")
    lines = [
        f"| % of the best by 15 % / 30 % of the configs | configs | default alone | {' | '.join(shown)} |",
        "|" + "---|" * 8,
    ]
    lines[0] += " tilebook ends at | 1/5 of autotune |"
    lines[1] += "---|" * 2
    for result in sorted(results, key=lambda each: bool(each["held_out"])):
        ours = result["methods"]["tilebook"]
        name = f"{result['op']} {result['problem']}" + (" (held out)" if result["held_out"] else "")
        sample = "" if result["whole"] else f" (of {result['feasible']:,})"
        default = f"{100 * result['default_share_of_best']:.1f}" + (
            "" if result["default_of_today"] else " (of the day)"
        )
        cells = [name, f"{result['configs']}{sample}", default]
        for method in shown:
            shares = " / ".join(f"{100 * v[1]:.1f}" for v in result["methods"][method]["share_of_best"].values())
            cells.append(f"**{shares}**" if method in OURS else shares)
        cells.append(f"{100 * ours['end'][1]:.1f} after {ours['configs']:.0f}, {ours['seconds']:.0f} s")
        cells.append(f"{100 * result['in_a_fifth_of_autotune']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """One row a sweep: the share of the exhaustive best against configs tried, and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(METHODS, ("#c1121f", "#6a4c93", "#555555", "#b0b0b0", "#1f77b4", "#e09f3e"), strict=True))
    figure, rows = plt.subplots(len(results), 2, figsize=(10, 2.3 * len(results)), squeeze=False, layout="constrained")
    for (left, right), result in zip(rows, results, strict=True):
        sampled = "" if result["whole"] else " (sample)"
        sampled += ", held out" if result["held_out"] else ""
        left.set_title(
            f"{result['op']}  {result['problem']}  —  {result['configs']} configs{sampled}", loc="left", fontsize=9
        )
        for name, method in result["methods"].items():
            for axes, key, scale in (
                (left, "by_tried", 100 / result["configs"]),
                (right, "by_seconds", 1.0),
            ):
                if name == "triton.autotune" and axes is left:
                    continue  # the grid's curve
                at, low, middle, high = np.array(method[key]).T
                width = 2.0 if name in OURS else 1.2
                axes.plot(at * scale, 100 * middle, color=colours[name], lw=width, label=name, zorder=2 + width)
                if name in (*OURS, "random", "plain TPE"):
                    axes.fill_between(at * scale, 100 * low, 100 * high, color=colours[name], alpha=0.15, lw=0)
        mine = result["methods"]["tilebook"]
        left.plot(100 * mine["configs"] / result["configs"], 100 * mine["end"][1], "o", color=colours["tilebook"], ms=4)
        right.plot(mine["seconds"], 100 * mine["end"][1], "o", color=colours["tilebook"], ms=4)
        for share in SHARES:
            left.axvline(100 * share, color="#dddddd", lw=0.8, zorder=0)
        left.set_xlim(0, 50)
        right.set_xlim(0, mine["by_seconds"][-1][0])
        for axes in (left, right):
            axes.set_ylim(70, 100.5)
            axes.grid(axis="y", color="#eeeeee", lw=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
        left.set_ylabel("% of best", fontsize=8)
    rows[-1][0].set_xlabel("configs tried, % of all", fontsize=9)
    rows[-1][1].set_xlabel("simulated seconds", fontsize=9)
    handles, labels = rows[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("sweeps", type=Path, nargs="+")
    arguments.add_argument("--seeds", type=int, default=20)
    arguments.add_argument("--out", type=Path, required=True, help="where to write, without a suffix")
    given = arguments.parse_args()
    results = []
    with ProcessPoolExecutor() as processes:
        for result in processes.map(judge, given.sweeps, [given.seeds] * len(given.sweeps)):
            results.append(result)
            print(f"{result['op']} {result['problem']}: {result['configs']} configs", end="")
            print(", held out" if result["held_out"] else "", end="")
            print(
                f", default {100 * result['default_share_of_best']:.1f} %; in a fifth of triton.autotune's time", end=""
            )
            print(f" {100 * result['in_a_fifth_of_autotune']:.2f} % of the best")
            for name, lag in result["behind_random"].items():
                most = f"{lag['at']}, by {100 * lag['most']:.1f} % at most" if lag["at"] else "no budget"
                print(f"  {name}, with {lag['seeds']} seeds: behind random at {most}", end="")
                print(f"; by more than luck at {lag['surely_at'] or 'none'}; until {lag['until_s']} s")
            for name, method in result["methods"].items():
                shares = "  ".join(f"{100 * v[1]:.2f} % by {share}" for share, v in method["share_of_best"].items())
                end = f"{100 * method['end'][1]:.2f} % after {method['configs']:.0f} configs, {method['seconds']:.0f} s"
                print(f"  {name}: {shares}; {end}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "search", "seeds": given.seeds, "fixed": FIXED.isoformat(), "results": results}
    given.out.with_suffix(".json").write_text(json.dumps(document, separators=(",", ":")) + "\n")
    draw(results, given.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
