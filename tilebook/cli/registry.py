"""The commands that read and change registries: show, explain, status, export, import, repair, revoke."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tilebook.cli.common import FORMAT, REGISTRY, main, print_rows


@main.command()
@click.option("--op", metavar="OP", help="Only this op.")
@click.option("--gpu", metavar="NAME", help="Only GPUs whose name contains this.")
@REGISTRY
@FORMAT
def show(op: str | None, gpu: str | None, registry: str | None, format_: str) -> None:
    """Prints the verdicts of all layers: what dispatch would serve, from where, and how sure it is."""
    from tilebook import device as devices
    from tilebook import op as ops
    from tilebook.registry import DenyList, Layers
    from tilebook.report.rows import row

    name = ops.get(op).name if op else None
    layers = Layers.default(registry)
    found, revocations = layers.read(op=name)
    denied = DenyList((revocation for _, revocation in revocations), devices.package_version("triton"))
    if registry:
        layers.demand_explicit()
    for problem in layers.problems:
        click.echo(f"tilebook: {problem}", err=True)
    wanted = [(layer, v) for layer, v in found if not gpu or gpu.lower() in v.device.name.lower()]
    print_rows([row(verdict, layer, denied.winner(verdict)) for layer, verdict in wanted], format_)


@main.command()
@click.argument("op")
@click.option("--shape", required=True, metavar="SHAPE", help="The problem, such as B8,H6,S196,D64,causal.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--gpu", metavar="NAME", help="For this GPU model (default: the one here).")
@REGISTRY
@FORMAT
def explain(op: str, shape: str, dtype: str, gpu: str | None, registry: str | None, format_: str) -> None:
    """Says what dispatch would run for one problem, from which layer, why, and how stale the evidence is."""
    from tilebook import op as ops
    from tilebook.report.explain import explain as describe

    found = ops.get(op)
    text, data = describe(found, found.problem.parse(shape, dtype), gpu, registry)
    click.echo(json.dumps(data, indent=2) if format_ == "json" else text)


@main.command()
@click.option("--gpu", metavar="NAME", help="For this GPU model (default: the one here).")
@REGISTRY
@FORMAT
def status(gpu: str | None, registry: str | None, format_: str) -> None:
    """Says what programs asked for that had no verdict, heaviest first, and how much of that is covered by now."""
    from tilebook.report.status import status as describe

    text, data = describe(gpu, registry)
    for problem in data["problems"]:
        click.echo(f"tilebook: {problem}", err=True)
    click.echo(json.dumps(data, indent=2) if format_ == "json" else text)


@main.command("export")
@click.argument("file", type=click.Path(allow_dash=True))
@REGISTRY
def export_(file: str, registry: str | None) -> None:
    """Writes a registry to FILE as JSON Lines, to be passed on and imported elsewhere; - is stdout.

    Without a record of one's own, what `show` shows is written. A file that is there is replaced if it is an export.
    """
    from tilebook.cli.files import written
    from tilebook.registry import Layers, Registry
    from tilebook.registry.lines import written as in_lines

    layers = Layers.default(registry)
    first, target = layers.layers[0]
    count, text, problems = 0, [], layers.problems
    if first == "explicit" or (first == "user" and Path(target).exists()):
        with Registry.open(target) as source:
            text = in_lines(source.revocations(), source.verdicts(), source.trials())
        count, problems = len(text) - 1, source.problems
    if not count and first != "explicit":  # a registry may have been made for what was refused, or a miss
        verdicts, revocations = layers.read()
        text = in_lines((each for _, each in revocations), (each for _, each in verdicts))
        count, problems = len(text) - 1, layers.problems
    with written(file) as stream:
        stream.writelines(text)
    for problem in problems:
        click.echo(f"tilebook: {problem}", err=True)
    click.echo(f"{count} records written to {'stdout' if file == '-' else file}", err=True)


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--trust", is_flag=True, help="Serve its verdicts without verifying them here first, and honour its revocations."
)
@REGISTRY
def import_(file: str, trust: bool, registry: str | None) -> None:
    """Merges FILE into the registry; - is stdin. What it says is not served until it is verified here, or with --trust.

    Nor are its revocations honoured without --trust.
    """
    from tilebook import op as ops
    from tilebook import registry as store
    from tilebook.cli.files import opened
    from tilebook.report.rows import is_retired

    allowed = {
        name: frozenset(axis for each in op.implementations.values() if each.space for axis in each.space.axes)
        for name, op in ops.ops().items()
    }
    layers = store.Layers.default(registry)
    with opened(file) as stream, layers.writer() as target:
        try:
            report = store.load(target, stream, allowed=allowed, trust=trust, is_problem=_is_problem)
        except UnicodeDecodeError:
            raise store.RegistryError(f"{file} is not UTF-8 text") from None
    for line in report.skipped:
        click.echo(f"tilebook: skipped: {line}", err=True)
    done = f"{report.trials} trials and {report.verdicts} verdicts imported"
    if report.revocations:
        done += f", and {report.revocations} revocations" + ("" if trust else ", not honoured without --trust")
    click.echo(done, err=True)
    if retired := sum(map(is_retired, report.accepted)):
        click.echo(f"{retired} of the file's verdicts are retired: of kernels as they were, and not served", err=True)


def _is_problem(op: str, key: str) -> bool:
    """Whether the text is the key of a problem of this op, one that can be posed."""
    from tilebook import op as ops

    try:
        ops.get(op).problem.from_key(key).check()
    except (TypeError, ValueError):
        return False
    return True


@main.command()
@REGISTRY
def repair(registry: str | None) -> None:
    """Removes the rows of the registry that are left out as damaged. Damaged revocations stay: see `revoke --undo`."""
    from tilebook.registry import Layers

    with Layers.default(registry).writer() as target:
        click.echo(f"{target.remove_damaged()} damaged rows removed from {target.label}", err=True)


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
