"""The commands about several registries: diff, merge."""

from __future__ import annotations

from pathlib import Path

import click

from tilebook.cli.common import DTYPE, FORMAT, GPU, OP, example, is_problem, main, print_json, skipped


@main.command(
    epilog=example("tilebook diff shipped user --gpu H200", "tilebook diff before.jsonl team.db --format json")
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@OP
@GPU
@DTYPE
@click.option("--exit-code", is_flag=True, help="Exit with 1 where they differ.")
@FORMAT
def diff(a: str, b: str, op: str | None, gpu: str | None, dtype: str | None, exit_code: bool, format_: str) -> None:
    """Says in which verdicts two registries differ: what only one has, other winners, other times.

    A and B are each a registry's path or URL, an export, `user` for one's own registry, or `shipped` for what the
    package has. Verdicts are compared that are for the same problem, GPU model and source of the kernel.
    """
    from tilebook.registry.difference import differences
    from tilebook.registry.selection import Selection
    from tilebook.registry.sources import verdicts
    from tilebook.report.difference import row, text

    selection = Selection(op=op, gpu=gpu, dtype=dtype)
    sides = []
    for name in (a, b):
        found, problems = verdicts(name)
        for problem in problems:
            click.echo(f"tilebook: {problem}", err=True)
        sides.append([each for each in found if selection.verdict(each.verdict)])
    differing = list(differences(*sides))
    rows = [row(each) for each in differing]
    print_json(rows) if format_ == "json" else click.echo(text(rows, a, b, *map(len, sides)))
    raise SystemExit(1 if exit_code and rows else 0)


@main.command(epilog=example("tilebook merge alice.db bob.jsonl -o team.db"))
@click.argument("sources", metavar="A B...", nargs=-1, required=True)
@click.option("--output", "-o", required=True, metavar="C", help="The registry to make, a file that is not there yet.")
@click.option("--trust", is_flag=True, help="Serve what exports say, as import --trust does.")
def merge(sources: tuple[str, ...], output: str, trust: bool) -> None:
    """Makes a new registry of others, and of exports. In which order they are named makes no difference.

    Of two verdicts on one problem the stronger stands: what is trusted, measured, one's own, of the tighter interval.
    What a registry trusts stays trusted, so name none of a stranger's. Exports are checked as by an import, and what
    they say is not served without --trust or the signature of a trusted key. What programs asked for is not merged.
    """
    from tilebook import inventory
    from tilebook.registry.gathering import merge as merged

    done = merged(sources, Path(output), allowed=inventory.axes(), is_problem=is_problem, trust=trust or None)
    for line in done.problems:
        click.echo(f"tilebook: {line}", err=True)
    skipped(done.skipped)
    counts = f"{done.verdicts} verdicts, {done.trials} trials and {done.revocations} revocations"
    met = f"; {done.met} times two verdicts met, and the stronger stands" if done.met else ""
    click.echo(f"{output} has {counts}{met}", err=True)
