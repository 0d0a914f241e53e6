"""The commands that say what a registry has, and take it back: show, explain, status, revoke."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import click

from tilebook.cli.common import (
    DTYPE,
    FORMAT,
    GPU,
    MEASURED,
    OP,
    REGISTRY,
    SINCE,
    YES,
    as_json,
    example,
    known_op,
    main,
    print_json,
    print_rows,
)

if TYPE_CHECKING:
    from tilebook.registry.layers import Layers

NOTHING = "no verdicts: run `tilebook tune` first"


@main.command(
    epilog=example(
        "tilebook show --op attention_fwd --gpu H200 --all", "tilebook show --since 7d --measured --format json"
    )
)
@OP
@GPU
@DTYPE
@SINCE
@MEASURED
@click.option(
    "--trials", is_flag=True, help="Show trials instead: every candidate that was tried, and what came of it."
)
@click.option("--all", "all_", is_flag=True, help="With configs, intervals and what lost, several lines a problem.")
@REGISTRY
@FORMAT
def show(
    op: str | None,
    gpu: str | None,
    dtype: str | None,
    since: datetime | None,
    measured: bool,
    trials: bool,
    all_: bool,
    registry: str | None,
    format_: str,
) -> None:
    """Prints the verdicts of all layers: what dispatch would serve, from where, and how sure it is.

    A table has a line for each problem: the winner, its time, and how many times as long our default config and
    PyTorch's fastest own kernel take.
    """
    from tilebook.registry.layers import Layers
    from tilebook.registry.selection import Selection
    from tilebook.report.rows import deny_list, row
    from tilebook.report.trials import trial_row, trial_table

    selection = Selection(op=known_op(op), gpu=gpu, dtype=dtype, since=since, measured=measured)
    layers = Layers.default(registry)
    if trials:
        tried = [trial_row(each, layer) for layer, each in layers.trials(op=op, gpu=gpu) if selection.trial(each)]
    else:
        found, revocations = layers.overviews(op=op, gpu=gpu)
        denied = deny_list(revocations)
    if registry:
        layers.demand_explicit()
    for problem in layers.problems:
        click.echo(f"tilebook: {problem}", err=True)
    if trials:
        print_json(tried) if format_ == "json" else click.echo(trial_table(tried))
        return
    wanted = [(layer, verdict) for layer, verdict in found if selection.verdict(verdict)]
    nothing = NOTHING if selection.everything else f"no verdict fits{_unknown_gpu(gpu, layers) if gpu else ''}"
    rows = [row(verdict, layer, denied.winner(verdict)) for layer, verdict in wanted]
    print_rows(rows, format_, nothing=nothing, brief=not all_)


def _unknown_gpu(gpu: str, layers: Layers) -> str:
    """Says which GPUs there are, where none is called so."""
    from tilebook import device as devices
    from tilebook.registry.checks import called

    known = {*devices.CATALOGUE, *(verdict.device.name for _, verdict in layers.overviews()[0])}
    if any(called(gpu, name) for name in known):
        return ""
    return f": no GPU of the catalogue or of a registry is called {gpu}; there are {', '.join(sorted(known))}"


@main.command(epilog=example("tilebook explain attention_fwd --shape B8,H16,S2048,D128,causal --gpu H200"))
@click.argument("op")
@click.option("--shape", required=True, metavar="SHAPE", help="The problem, such as B8,H6,S196,D64,causal.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--gpu", metavar="NAME", help="For this GPU model (default: the one here).")
@REGISTRY
@FORMAT
def explain(op: str, shape: str, dtype: str, gpu: str | None, registry: str | None, format_: str) -> None:
    """Says what dispatch would run for one problem, from which layer, why, and how stale the evidence is."""
    from tilebook import op as ops
    from tilebook.foreign.names import is_foreign
    from tilebook.report.explain import explain as describe
    from tilebook.report.explain import explain_foreign

    if is_foreign(op):
        text, data = explain_foreign(op, shape, gpu, registry)
    else:
        found = ops.get(op)
        text, data = describe(found, found.problem.parse(shape, dtype), gpu, registry)
    click.echo(as_json(data, indent=2) if format_ == "json" else text)


@main.command(epilog=example("tilebook status --gpu H200"))
@click.option("--gpu", metavar="NAME", help="For this GPU model (default: the one here).")
@REGISTRY
@FORMAT
def status(gpu: str | None, registry: str | None, format_: str) -> None:
    """Says what programs asked for that had no verdict, heaviest first, and how much of that is covered by now."""
    from tilebook.report.status import status as describe

    text, data = describe(gpu, registry)
    for problem in data["problems"]:
        click.echo(f"tilebook: {problem}", err=True)
    click.echo(as_json(data, indent=2) if format_ == "json" else text)


@main.command(
    epilog=example(
        "tilebook revoke attention_fwd --config BLOCK_M=128,num_warps=8 --triton '>=3.6,<3.7' --reason 'wrong at S=1'",
        "tilebook revoke --list",
    )
)
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
@YES
@REGISTRY
@FORMAT
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
    yes: bool,
    registry: str | None,
    format_: str,
) -> None:
    """Takes back what proved wrong: from now on OP never runs it, whichever layer has a verdict for it.

    Revocations of all layers count together, and travel with export, import --trust and the package.
    """
    from tilebook import revocation as revoking
    from tilebook.errors import UsageError
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
        if not yes:
            click.confirm(f"Revoke {revoking.line(revoking.row('', made))}?", abort=True, err=True)
        new, rows = revoking.revoke(layers, made)
        click.echo(as_json(rows, indent=2) if format_ == "json" else revoking.told(made, new, rows))
    else:
        rows = [revoking.row(layer, each) for layer, each in layers.revocations()]
        for problem in layers.problems:
            click.echo(f"tilebook: {problem}", err=True)
        text = "\n".join(map(revoking.line, rows)) or "no revocations"
        click.echo(as_json(rows, indent=2) if format_ == "json" else text)
