"""The command that runs a program and notes what it calls other people's kernels with: record."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tilebook.cli.common import example, main, unheard
from tilebook.variables import SPACES, TRITON


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=example("tilebook record -- python train.py", "tilebook record --spaces spaces.json -- torchrun train.py"),
)
@click.option(
    "--to", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Where (default: the user's)."
)
@click.option(
    "--spaces",
    type=click.Path(exists=True, path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A JSON file of spaces for kernels that have no autotuner.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def record(to: Path | None, spaces: Path | None, command: tuple[str, ...]) -> None:
    """Runs COMMAND under TILEBOOK_TRITON=record: what its Triton kernels are called with is written down, of those that
    have an autotuner or, by --spaces, a space.

    No tensor's contents are. `tilebook tune --recorded` tunes these kernels then.
    """
    os.environ[TRITON] = f"record:{to.absolute()}" if to else "record"
    if spaces:
        os.environ[SPACES] = str(spaces.absolute())
    if against := unheard():
        click.echo(f"tilebook: {against}", err=True)
    try:
        os.execvp(command[0], command)
    except OSError as wrong:
        raise click.UsageError(f"{command[0]} cannot be run: {wrong.strerror}") from None
