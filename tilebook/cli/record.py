"""The command that runs a program and notes what it calls other people's kernels with: record."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
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

    No tensor's contents are. `tilebook tune --recorded` tunes these kernels then. Output, input and exit status are the
    program's; at its end a line on stderr says what was recorded.
    """
    from tilebook.cli.child import run
    from tilebook.foreign.spacefile import read
    from tilebook.registry.target import user_folder

    environment = {**os.environ, TRITON: f"record:{to.absolute()}" if to else "record"}
    given = {} if spaces is None else read(spaces)
    if spaces:
        environment[SPACES] = str(spaces.absolute())
    if against := unheard():
        click.echo(f"tilebook: {against}", err=True)
    place = to.absolute() if to else user_folder() / "recorded"
    before = _files(place)
    status = run(command, environment)
    new = [file for file, written in _files(place).items() if before.get(file) != written]
    click.echo(f"tilebook: {_told(place, new, given, to is not None)}", err=True)
    raise SystemExit(status)


def _files(place: Path) -> dict[Path, int]:
    """The records that are there, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in place.glob("*.json")} if place.is_dir() else {}


def _told(place: Path, new: Iterable[Path], given: Collection[str], named: bool) -> str:
    """What was recorded, and what to do next; or why nothing was."""
    kernels: dict[str, set[str]] = {}
    left_out: dict[str, None] = {}
    for file in new:
        content = json.loads(file.read_text(encoding="utf-8"))
        left_out |= dict.fromkeys(content["left_out"])
        for each in content["kernels"]:
            kernels.setdefault(f"{each['module']}:{each['name']}", set()).update(p["key"] for p in each["problems"])
    never = [name for name in given if name not in kernels]
    more = f"; nothing was recorded of {', '.join(never)}, which the spaces name" if never else ""
    more += f"; left out: {'; '.join(left_out)}" if left_out else ""
    if not kernels:
        return f"no kernel was recorded: the program called none that has an autotuner or a space{more}"
    problems = sum(map(len, kernels.values()))
    some = f"{len(kernels)} kernel{'s' * (len(kernels) > 1)} and {problems} problem{'s' * (problems > 1)}"
    where = f" {place}" if named else ""
    return f"{some} recorded in {place}{more}: `tilebook tune --recorded{where}` tunes them"
