"""The command line: parses, calls, prints. Data goes to stdout, progress and errors to stderr.

Exit status: 0 done; 1 a registry or file could not be used, or a problem could not be tuned; 2 wrong usage; 130 Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

if TYPE_CHECKING:
    from tilebook.op import Op, Problem

_REGISTRY = click.option(
    "--registry", metavar="PATH", help="Registry file or SQLAlchemy URL (default: $TILEBOOK_REGISTRY, else the user's)."
)
_SUITES = click.option(
    "--suite",
    "suites",
    metavar="NAME",
    multiple=True,
    help="A named list of problems: quick, seeds, fa …; repeatable (default: quick).",
)
_FORMAT = click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)


class _Tidy(click.Group):
    """A group whose expected errors are one line on stderr, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from tilebook.op import UsageError
        from tilebook.registry import RegistryError

        try:
            return super().invoke(ctx)
        except UsageError as wrong:
            _fail(str(wrong), 2)
        except (RegistryError, OSError) as broken:
            _fail(str(broken), 1)
        except KeyboardInterrupt:
            _fail("interrupted; what was done is kept, and the same command goes on from there", 130)


def _fail(text: str, status: int) -> NoReturn:
    click.echo(f"tilebook: {' '.join(text.split())}", err=True)
    raise SystemExit(status)


@click.group(cls=_Tidy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilebook")
def main() -> None:
    """Finds the fastest correct way to run attention and MLPs on a GPU, keeps it, and serves it to model code."""


class _Seconds(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip().lower()
        unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
        try:
            seconds = float(text[:-1]) * unit if unit else float(text)
        except ValueError:
            self.fail(f"{value!r} is not a duration such as 180s, 5m or 1h", param, ctx)
        if not 0 < seconds < float("inf"):
            self.fail(f"{value!r} is not a duration above zero", param, ctx)
        return seconds


@main.command()
@click.argument("families", nargs=-1, metavar="[FAMILY]...")
@_SUITES
@click.option(
    "--shape", "shapes", multiple=True, metavar="SHAPE", help="A problem such as B8,H6,S196,D64,causal; repeatable."
)
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True, help="With --shape.")
@click.option("--direction", type=click.Choice(["fwd", "bwd", "both"]), default="both", show_default=True)
@click.option("--gpu", metavar="NAME", help="Tune for this GPU model without one, from the catalogue.")
@click.option("--gpus", metavar="all|0,1,…", help="Measure on these GPUs of this host, side by side (default: 0).")
@click.option(
    "--mode",
    type=click.Choice(["graph", "eager"]),
    default="graph",
    show_default=True,
    help="What to optimise: the GPU's time, replayed from a CUDA graph, or that of eager calls, host cost included.",
)
@click.option(
    "--budget",
    type=_Seconds(),
    metavar="TIME",
    help="Stop searching after this time (180s, 5m), shared by the problems (default: none, until each has converged).",
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
@click.option("--workers", type=click.IntRange(min=1), help="Compiler processes (default: one per core).")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Tune again what has a verdict already.")
@_REGISTRY
@_FORMAT
def tune(
    families: tuple[str, ...],
    suites: tuple[str, ...],
    shapes: tuple[str, ...],
    dtype: str,
    direction: str,
    gpu: str | None,
    gpus: str | None,
    mode: Literal["graph", "eager"],
    budget: float | None,
    trials: int | None,
    method: str,
    workers: int | None,
    seed: int,
    force: bool,
    registry: str | None,
    format_: str,
) -> None:
    """Searches the fastest correct configs for problems on a GPU and keeps trials and verdicts in the registry.

    On a machine with a GPU every candidate is verified, then timed. With --gpu NAME, and no such GPU here, candidates
    are compiled for that model and ranked by a performance model; their verdicts are marked predicted.

    The same command resumes a run that was interrupted. A problem that has a verdict is skipped; where the space has
    grown since, only what is new is tried. A GPU model keeps one verdict a problem, so that tuning in the other mode
    replaces it.
    """
    from tilebook.tuner.run import tune_problems

    problems = _problems(families, suites, shapes, dtype, direction)
    states, rows = tune_problems(
        problems,
        gpu=gpu,
        gpus=gpus,
        mode=mode,
        registry=registry,
        budget_s=budget,
        trials=trials,
        method=method,
        workers=workers,
        seed=seed,
        force=force,
    )
    _print(rows, format_, tuned=True)
    for state in states:
        if state.error:
            click.echo(f"tilebook: {state.op} {state.label}: {state.error}", err=True)
    if any(state.error for state in states):
        raise SystemExit(1)


def _problems(
    families: Sequence[str], suites: Sequence[str], shapes: Sequence[str], dtype: str, direction: str
) -> list[tuple[Op[Any], Problem]]:
    from tilebook import op as ops

    known = ops.families()
    for family in families:
        if family not in known:
            raise ops.UsageError(f"no kernel family {family!r}; there are {', '.join(sorted(known))}")
    if suites and shapes:
        raise ops.UsageError("give --suite or --shape, not both")
    chosen = [op for name, members in known.items() if not families or name in families for op in members]
    chosen = [op for op in chosen if direction in ("both", op.direction)]
    if shapes:
        if len(families) != 1:
            raise ops.UsageError("--shape needs exactly one family, such as: tilebook tune attention --shape …")
        return [(op, op.problem.parse(shape, dtype)) for shape in shapes for op in chosen]
    named = ops.suites(chosen)
    found: list[tuple[Op[Any], Problem]] = []
    for name in suites or ["quick"]:
        if name not in named:
            everywhere = sorted(ops.suites(ops.ops().values()))
            raise ops.UsageError(f"no suite {name!r} here; there are {', '.join(everywhere)}")
        found += named[name]
    return list(dict.fromkeys(found))


@main.command()
@click.option("--op", metavar="OP", help="Only this op.")
@click.option("--gpu", metavar="NAME", help="Only GPUs whose name contains this.")
@_REGISTRY
@_FORMAT
def show(op: str | None, gpu: str | None, registry: str | None, format_: str) -> None:
    """Prints the verdicts of all layers: what dispatch would serve, from where, and how sure it is."""
    from tilebook import device as devices
    from tilebook import op as ops
    from tilebook.registry import DenyList, Layers, RegistryError
    from tilebook.report.rows import row

    name = ops.get(op).name if op else None
    layers = Layers.default(registry)
    found, revocations = layers.read(op=name)
    denied = DenyList(revocations, devices.package_version("triton"))
    if registry and layers.problems:
        raise RegistryError(layers.problems[0])
    for problem in layers.problems:
        click.echo(f"tilebook: {problem}", err=True)
    wanted = [(layer, v) for layer, v in found if not gpu or gpu.lower() in v.device.name.lower()]
    _print([row(verdict, layer, denied.winner(verdict)) for layer, verdict in wanted], format_)


@main.command()
@click.argument("op")
@click.option("--shape", required=True, metavar="SHAPE", help="The problem, such as B8,H6,S196,D64,causal.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--gpu", metavar="NAME", help="For this GPU model (default: the one here).")
@_REGISTRY
@_FORMAT
def explain(op: str, shape: str, dtype: str, gpu: str | None, registry: str | None, format_: str) -> None:
    """Says what dispatch would run for one problem, from which layer, why, and how stale the evidence is."""
    from tilebook import op as ops
    from tilebook.report.explain import explain as describe

    found = ops.get(op)
    text, data = describe(found, found.problem.parse(shape, dtype), gpu, registry)
    click.echo(json.dumps(data, indent=2) if format_ == "json" else text)


@main.command("export")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_REGISTRY
def export_(file: Path, registry: str | None) -> None:
    """Writes a registry to FILE as JSON Lines, to be passed on and imported elsewhere."""
    from tilebook import registry as store

    layers = store.Layers.default(registry)
    with store.Registry.open(layers.layers[0][1]) as source:
        partial = file.with_name(f".{file.name}.partial")
        try:
            with partial.open("w", encoding="utf-8") as stream:
                count = store.export(source, stream)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    click.echo(f"{count} records written to {file}", err=True)


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--trust", is_flag=True, help="Serve its verdicts without verifying them here first, and honour its revocations."
)
@_REGISTRY
def import_(file: Path, trust: bool, registry: str | None) -> None:
    """Merges FILE into the registry. What it says is not served until it is verified here, or with --trust.

    Nor are its revocations honoured without --trust.
    """
    from tilebook import op as ops
    from tilebook import registry as store

    allowed = {
        name: frozenset(axis for each in op.implementations.values() if each.space for axis in each.space.axes)
        for name, op in ops.ops().items()
    }
    layers = store.Layers.default(registry)
    with file.open(encoding="utf-8", newline="\n") as stream, layers.writer() as target:
        try:
            report = store.load(target, stream, allowed=allowed, trust=trust)
        except UnicodeDecodeError:
            raise store.RegistryError(f"{file} is not UTF-8 text") from None
    for line in report.skipped:
        click.echo(f"tilebook: skipped: {line}", err=True)
    done = f"{report.trials} trials and {report.verdicts} verdicts imported"
    if report.revocations:
        done += f", and {report.revocations} revocations" + ("" if trust else ", not honoured without --trust")
    click.echo(done, err=True)


@main.command()
@click.argument("what", metavar="FAMILY|OP")
@_SUITES
@click.option("--shape", "shapes", multiple=True, metavar="SHAPE", help="A problem such as B8,H6,S196,D64; repeatable.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16"]), default="bf16", show_default=True, help="With --shape.")
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
    from tilebook.tuner.sweep import record_problems

    only = None if what in ops.families() else ops.get(what)
    family = only.family if only else what
    problems = [each for each in _problems([family], suites, shapes, dtype, direction) if only in (None, each[0])]
    states = record_problems(problems, out, most=most, seed=seed, workers=workers, implementation=implementation)
    for state in states:
        if state.error:
            click.echo(f"tilebook: {state.op} {state.label}: {state.error}", err=True)
    if any(state.error for state in states):
        raise SystemExit(1)


def _print(rows: Sequence[dict[str, Any]], format_: str, tuned: bool = False) -> None:
    if format_ == "json":
        click.echo(json.dumps(list(rows), indent=2))
        return
    from tilebook.report.rows import table

    table(rows, sys.stdout, tuned=tuned)


@main.command()
@click.argument("op", required=False)
@click.option("--implementation", metavar="NAME", help="What may not run: our kernel (default), cudnn …")
@click.option("--config", metavar="AXIS=VALUE,…", help="Only configs with all these values (default: every config).")
@click.option("--arch", metavar="ARCH", help="Only on such GPUs: sm_90 … (default: on all).")
@click.option("--triton", metavar="RANGE", help="Only under these versions of Triton: '>=3.6,<3.7' (default: all).")
@click.option(
    "--kernel",
    metavar="DIGEST",
    help="Only this source of our kernel, or of the implementation: its digest, current or any"
    " (default: current; any with --triton, where the compiler is at fault).",
)
@click.option("--reason", metavar="TEXT", help="What proved wrong; required.")
@click.option("--list", "list_", is_flag=True, help="Print the revocations of all layers.")
@click.option("--undo", metavar="ID", help="Remove a revocation from the registry that is written to, and no other.")
@_REGISTRY
@_FORMAT
def revoke(
    op: str | None,
    implementation: str | None,
    config: str | None,
    arch: str | None,
    triton: str | None,
    kernel: str | None,
    reason: str | None,
    list_: bool,
    undo: str | None,
    registry: str | None,
    format_: str,
) -> None:
    """Takes back what proved wrong: from now on OP never runs it, whichever layer has a verdict for it.

    Revocations of all layers count together, and travel with export, import --trust and the package.
    """
    from tilebook import revocation as revoking
    from tilebook.op import UsageError
    from tilebook.registry import Layers

    scope = (implementation, config, arch, triton, kernel, reason)
    if [op is not None, list_, undo is not None].count(True) != 1 or (op is None and any(scope)):
        raise UsageError("revoke needs an OP and a --reason, or --list alone, or --undo ID alone")
    layers = Layers.default(registry)
    if undo is not None:
        revoking.undo(layers, undo)
        click.echo(f"revocation {undo} removed", err=True)
    elif op is not None:
        made = revoking.make(op, implementation, config, arch, triton, kernel, reason)
        new, rows = revoking.revoke(layers, made)
        click.echo(json.dumps(rows, indent=2) if format_ == "json" else revoking.told(made, new, rows))
    else:
        rows = [revoking.row(layer, each) for layer, each in layers.revocations()]
        for problem in layers.problems:
            click.echo(f"tilebook: {problem}", err=True)
        text = "\n".join(map(revoking.line, rows)) or "no revocations"
        click.echo(json.dumps(rows, indent=2) if format_ == "json" else text)


if __name__ == "__main__":
    main()
