"""The commands that compile and measure: tune, sweep."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from tilebook.cli.common import FORMAT, REGISTRY, SUITES, Seconds, example, main, print_rows
from tilebook.errors import meant

if TYPE_CHECKING:
    from tilebook.op import Op, Problem
    from tilebook.report.asked import Asked
    from tilebook.tuner.hints import Hints
    from tilebook.tuner.run import Outcome


@main.command(
    epilog=example(
        "tilebook tune --suite seeds", "tilebook tune attention --shape B8,H16,S2048,D128,causal --budget 5m"
    )
)
@click.argument("families", nargs=-1, metavar="[FAMILY|OP]...")
@SUITES
@click.option(
    "--shape", "shapes", multiple=True, metavar="SHAPE", help="A problem such as B8,H6,S196,D64,causal; repeatable."
)
@click.option("--misses", is_flag=True, help="What programs asked for and no verdict covers, heaviest first.")
@click.option(
    "--recorded",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="What programs under TILEBOOK_TRITON=record called other people's kernels with, heaviest first"
    " (default: all records of this user).",
)
@click.option(
    "--rules",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --recorded: a JSON file that says how kernels' integer tensors are made.",
)
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True, help="With --shape."
)
@click.option("--direction", type=click.Choice(["fwd", "bwd", "both"]), default="both", show_default=True)
@click.option("--gpu", metavar="NAME", help="Tune for this GPU model without one, from the catalogue.")
@click.option("--gpus", metavar="all|0,1,…", help="Measure on these GPUs of this host, side by side (default: 0).")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Tune on the GPUs of a Ray cluster, for each model that it has: auto, host:port or ray://host:10001.",
)
@click.option(
    "--mode",
    type=click.Choice(["graph", "eager"]),
    default="graph",
    show_default=True,
    help="What to optimise: the GPU's time, replayed from a CUDA graph, or that of eager calls, host cost included.",
)
@click.option(
    "--budget",
    type=Seconds(),
    metavar="TIME",
    help="End after about this time (180s, 5m; a bare number is of seconds):"
    " what is worth most of the GPU's time comes first and has most of it,"
    " what is not reached is said (default: none, until each has converged).",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    help="Candidates per problem, of each implementation that has a space"
    " (default: until converged, which is 48 in a row that gain less than 1 %).",
)
@click.option(
    "--search", "method", default="tpe", show_default=True, help="tpe, random, grid, or another Optuna sampler."
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Compiler processes (default: one per core); with --ray, of each GPU (default: its part of the cores).",
)
@click.option(
    "--hints",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Configs that others have found, to be tried first: a file or folder of Triton's *.autotune.json,"
    " triton-dejavu's, flash-linear-attention's, vLLM's or SGLang's MoE tables, or AOTriton's databases.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Tune again what has a verdict already.")
@REGISTRY
@FORMAT
def tune(
    families: tuple[str, ...],
    suites: tuple[str, ...],
    shapes: tuple[str, ...],
    misses: bool,
    recorded: str | None,
    rules: Path | None,
    dtype: str,
    direction: str,
    gpu: str | None,
    gpus: str | None,
    ray: str | None,
    mode: Literal["graph", "eager"],
    budget: float | None,
    trials: int | None,
    method: str,
    workers: int | None,
    hints: Path | None,
    seed: int,
    force: bool,
    registry: str | None,
    format_: str,
) -> None:
    """Searches the fastest correct configs for problems on a GPU and keeps trials and verdicts in the registry.

    On a machine with a GPU every candidate is verified, then timed. With --gpu NAME, and no such GPU here, candidates
    are compiled for that model and ranked by a performance model; their verdicts are marked predicted.

    The same command resumes a run that was interrupted. A problem that has a verdict is skipped, to predict also one
    that has a measured one in any layer; where the space has grown since, only what is new is tried. A GPU model keeps
    one verdict a problem, so that tuning in the other mode replaces it. A FAMILY, a --suite or a --gpu that there is
    not is answered with those that there are.
    """
    from tilebook.op import UsageError
    from tilebook.report.live import view
    from tilebook.tuner.cluster.cluster import tune_cluster
    from tilebook.tuner.run import tune_problems

    if ray is not None and gpus is not None:
        raise UsageError(
            "give --ray or --gpus, not both: all GPUs of a cluster take part, --gpus names those of this host"
        )
    weights: list[float] | None = None
    if rules is not None and recorded is None:
        raise UsageError("--rules goes with --recorded")
    if recorded is not None:
        if misses or families or suites or shapes or ray:
            raise UsageError("--recorded goes with no FAMILY or OP and none of --misses, --suite, --shape and --ray")
        problems, weights = _recorded(recorded, rules)
    elif misses:
        missed = _missed(families, suites, shapes, direction, gpu, registry)
        problems = [(each.op, each.problem) for each in missed]
        weights = [each.weight_s for each in missed]
        if not problems:
            click.echo("tilebook: nothing to do: no problem that was asked for lacks a verdict", err=True)
            if format_ == "json":
                click.echo("[]")
            return
    else:
        problems = _problems(families, suites, shapes, dtype, direction)
    if ray is not None and hints is not None:
        raise UsageError("--hints goes without --ray")
    here = functools.partial(tune_problems, gpus=gpus, hints=_hints(hints))
    start = here if ray is None else functools.partial(tune_cluster, address=ray)
    outcomes = start(
        problems,
        gpu=gpu,
        mode=mode,
        registry=registry,
        budget_s=budget,
        trials=trials,
        method=method,
        workers=workers,
        seed=seed,
        force=force,
        weights=weights,
        watch=view,
    )
    _print(outcomes if isinstance(outcomes, list) else [outcomes], format_, budget)


def _hints(place: Path | None) -> Hints | None:
    """What the files say; says which could not be read."""
    if place is None:
        return None
    from tilebook.tuner.hints import read

    found = read(place)
    for line in found.left_out:
        click.echo(f"tilebook: left out: {line}", err=True)
    return found


def _recorded(place: str, rules: Path | None) -> tuple[list[tuple[Op[Any], Problem]], list[float]]:
    """The problems of a record, and what they are worth; says which kernels cannot be had."""
    from tilebook.foreign.offered import offered
    from tilebook.foreign.record import folder
    from tilebook.op import UsageError

    offer = click.get_current_context().with_resource(offered(Path(place) if place else folder(), rules))
    for line in offer.left_out:
        click.echo(f"tilebook: left out: {line}", err=True)
    if warning := offer.warning():
        click.echo(f"tilebook: {warning}", err=True)
    if not offer.problems:
        raise UsageError("none of the recorded kernels can be tuned")
    return offer.problems, offer.weights


def _print(outcomes: Sequence[Outcome], format_: str, budget_s: float | None) -> None:
    """A table for each GPU model, or all rows as JSON, and what failed; ends as the run did."""
    from tilebook.report.rows import tuned

    found = [tuned(each.states, each.layer, each.gpu.name) for each in outcomes]
    for rows in [list(itertools.chain(*found))] if format_ == "json" else found:
        print_rows(rows, format_, tuned=True)
    states = [state for each in outcomes for state in each.states]
    if any(each.interrupted for each in outcomes):
        raise KeyboardInterrupt
    failed = sum(bool(state.error) for state in states)
    if failed:  # which and why has been said as it happened
        click.echo(f"tilebook: {failed} of {len(states)} problems failed", err=True)
        raise SystemExit(1)
    if states and all(state.unreached and state.verdict is None for state in states):
        why = "; ".join(sorted({state.unreached for state in states}))
        advice = ": give it more time" if budget_s is not None else ""
        click.echo(f"tilebook: none of {len(states)} problems was reached ({why}){advice}", err=True)
        raise SystemExit(1)


def _ops(families: Sequence[str], direction: str) -> list[Op[Any]]:
    from tilebook import op as ops

    known = ops.families()
    named = set(known).union(op.name for members in known.values() for op in members)
    for family in families:
        if family not in named:
            there = f"the families are {', '.join(sorted(known))}"
            raise ops.UsageError(f"no kernel family or op {family!r}{meant(family, named)}; {there}")
    every = [(name, op) for name, members in known.items() for op in members]
    chosen = [op for name, op in every if not families or name in families or op.name in families]
    return [op for op in chosen if direction in ("both", op.direction)]


def _missed(
    families: Sequence[str],
    suites: Sequence[str],
    shapes: Sequence[str],
    direction: str,
    gpu: str | None,
    registry: str | None,
) -> list[Asked]:
    """What the ledger has that a tune could change, heaviest first."""
    from tilebook import device as devices
    from tilebook.op import UsageError
    from tilebook.report.asked import asked, target

    if suites or shapes:
        raise UsageError("give --misses or --suite or --shape, not two of them")
    chosen = _ops(families, direction)
    device = target(gpu)
    here = devices.present() and device == devices.current()
    return [
        each
        for each in asked(device, registry)
        if each.op in chosen and each.tunable and not (each.covered if here else each.exact)
    ]


def _bucket(op: Op[Any], shape: str, dtype: str) -> Problem:
    """The problem that calls of this shape ask for, which is not always the shape itself; then it says so."""
    written: Problem = op.problem.parse(shape, dtype)
    asked = written.bucket()
    if asked != written:
        told = f"{op.name} {written.label}: calls of this shape ask for {asked.label}, which is tuned"
        click.echo(f"tilebook: {told}", err=True)
    return asked


def _problems(
    families: Sequence[str], suites: Sequence[str], shapes: Sequence[str], dtype: str, direction: str
) -> list[tuple[Op[Any], Problem]]:
    from tilebook import op as ops

    if suites and shapes:
        raise ops.UsageError("give --suite or --shape, not both")
    chosen = _ops(families, direction)
    if shapes:
        if len(families) != 1:
            raise ops.UsageError("--shape needs exactly one family or op, such as: tilebook tune attention --shape …")
        return list(dict.fromkeys((op, _bucket(op, shape, dtype)) for shape in shapes for op in chosen))
    named = ops.suites(chosen)
    found: list[tuple[Op[Any], Problem]] = []
    for name in suites or ["quick"]:
        if name not in named:
            raise ops.UsageError(_no_suite(name, families, named))
        found += named[name]
    return list(dict.fromkeys(found))


def _no_suite(name: str, families: Sequence[str], named: Iterable[str]) -> str:
    """What to name instead: of what was chosen, where that has suites at all."""
    of = f" of {', '.join(families)}" if families else ""
    if there := sorted(named):
        return f"no suite {name!r}{of}{meant(name, there)}; there are {', '.join(there)}: name one with --suite"
    return f"there is no suite{of}: name a problem with --shape"


@main.command(epilog=example("tilebook sweep rms_norm --suite norms --out sweeps"))
@click.argument("what", metavar="FAMILY|OP")
@SUITES
@click.option("--shape", "shapes", multiple=True, metavar="SHAPE", help="A problem such as B8,H6,S196,D64; repeatable.")
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True, help="With --shape."
)
@click.option("--direction", type=click.Choice(["fwd", "bwd", "both"]), default="both", show_default=True)
@click.option("--implementation", metavar="NAME", help="Whose space (default: our own kernel's).")
@click.option("--most", type=click.IntRange(min=1), help="Configs of each space, chosen at random (default: all).")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(), help="FILE.jsonl for one problem, else a directory."
)
@click.option("--workers", type=click.IntRange(min=1), help="Compiler processes (default: one per core).")
def sweep(
    what: str,
    suites: tuple[str, ...],
    shapes: tuple[str, ...],
    dtype: str,
    direction: str,
    implementation: str | None,
    most: int | None,
    seed: int,
    out: Path,
    workers: int | None,
) -> None:
    """Measures the whole space of problems on the GPU that is here and records it, so that searches can be replayed.

    The same command resumes a sweep that was interrupted.
    """
    from tilebook import op as ops
    from tilebook.report.live import view
    from tilebook.tuner.sweeps.sweep import record_problems

    only = None if what in ops.families() else ops.get(what)
    family = only.family if only else what
    problems = [each for each in _problems([family], suites, shapes, dtype, direction) if only in (None, each[0])]
    states = record_problems(
        problems, out, most=most, seed=seed, workers=workers, implementation=implementation, watch=view
    )
    for state in states:
        if state.error:
            click.echo(f"tilebook: {state.op} {state.label}: {state.error}", err=True)
    if any(state.error for state in states):
        raise SystemExit(1)
