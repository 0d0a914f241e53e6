"""`tilebook doctor`."""

from __future__ import annotations

import click

from tilebook.cli.common import FORMAT, REGISTRY, as_json, example, main


@main.command(epilog=example("tilebook doctor"))
@click.option("--run/--no-run", default=True, show_default=True, help="Build and run what is ours, if there is a GPU.")
@REGISTRY
@FORMAT
def doctor(run: bool, registry: str | None, format_: str) -> None:
    """Says what works here, what does not and what to do about it: versions, GPUs, registries, known answers.

    Exit status 1 where something keeps tilebook from working.
    """
    from tilebook.report.doctor import data, findings, table

    found = findings(registry, run=run)
    click.echo(as_json(data(found), indent=2) if format_ == "json" else table(found))
    if any(each.level == "fault" for each in found):
        raise SystemExit(1)
