"""The commands that keep a registry in order: check, repair, remove, prune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from tilebook.cli.common import BEFORE, DTYPE, GPU, OP, REGISTRY, YES, example, main

if TYPE_CHECKING:
    from tilebook.registry.maintenance import Chosen, Retired, Wanted

ORIGIN = click.option(
    "--origin",
    type=click.Choice(["local", "imported", "shipped"]),
    help="Only what was made here (local), or came from elsewhere.",
)
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be removed, and change nothing.")


@main.command(epilog=example("tilebook check", "tilebook check --registry team.db --repair"))
@click.option("--repair", "mend", is_flag=True, help="Move the damaged rows of the registry to a file beside it.")
@REGISTRY
def check(mend: bool, registry: str | None) -> None:
    """Reads every record of the registry, or of all layers, and says what is damaged of it.

    Checked are the file's pages and indexes, what rows refer to, and the digest of each record. What is damaged is
    passed over by all that reads; --repair takes it out, so that what is left is whole.

    Exit status: 1 if anything is damaged and stays so.
    """
    from tilebook.registry.examination import examine, lines
    from tilebook.registry.layers import Layers

    if mend:
        _repair(registry)
    layers = Layers.default(registry).layers
    if layers[0][0] == "explicit":
        layers = layers[:1]
    found = [report for name, target in layers if (report := examine(name, target)) is not None]
    for report in found:
        for line in lines(report):
            click.echo(line)
    raise SystemExit(0 if all(report.whole for report in found) else 1)


@main.command(epilog=example("tilebook repair"))
@REGISTRY
def repair(registry: str | None) -> None:
    """Moves the rows of the registry that are damaged to a file beside it, as check --repair does.

    Damaged revocations stay: see `revoke --undo`.
    """
    _repair(registry)


def _repair(registry: str | None) -> None:
    from tilebook.errors import RegistryError
    from tilebook.registry import Layers
    from tilebook.registry.maintenance import repair as mend
    from tilebook.registry.target import Target

    layers = Layers.default(registry)
    first, where = layers.layers[0]
    if first in ("explicit", "user") and "://" not in where and not Path(where).expanduser().exists():
        if first == "explicit":
            raise RegistryError(f"there is no registry at {where}")
        click.echo(f"nothing to repair: there is no registry at {where}", err=True)
        return
    with layers.sink() as target:
        path = Target.parse(target.target).path or Path("tilebook-registry").absolute()
        aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}.jsonl")
        removed = mend(target, aside)
        where = f" and set aside in {aside}" if removed else ""
        click.echo(f"{removed} damaged rows removed from {target.label}{where}", err=True)


@main.command(
    epilog=example(
        "tilebook remove --op attention_fwd --gpu A100 --dry-run", "tilebook remove --origin imported --before 90d"
    )
)
@OP
@GPU
@DTYPE
@ORIGIN
@BEFORE
@click.option("--retired", is_flag=True, help="Only what is of kernels as they were, and not served.")
@click.option(
    "--only", type=click.Choice(["verdicts", "trials"]), help="Leave the trials, or the verdicts (default: both go)."
)
@DRY_RUN
@YES
@REGISTRY
def remove(
    op: str | None,
    gpu: str | None,
    dtype: str | None,
    origin: str | None,
    before: datetime | None,
    retired: bool,
    only: Literal["verdicts", "trials"] | None,
    dry_run: bool,
    yes: bool,
    registry: str | None,
) -> None:
    """Removes verdicts and trials from the registry: those that fit all that is given.

    Revocations stay, and so does what programs asked for. The file keeps its size: `tilebook prune` shrinks it.
    """
    from tilebook.errors import UsageError
    from tilebook.registry.maintenance import Wanted
    from tilebook.registry.selection import Selection

    selection = Selection(op=op, gpu=gpu, dtype=dtype, origin=origin, before=before)
    if selection.everything and not retired:
        raise UsageError("say what to remove: --op, --gpu, --dtype, --origin, --before or --retired")
    kinds = {"verdicts": only != "trials", "trials": only != "verdicts"}
    chosen = _carry_out(registry, [Wanted(selection, **kinds, retired=_retired() if retired else None)], dry_run, yes)
    if not chosen:
        click.echo("nothing fits")


@main.command(epilog=example("tilebook prune --dry-run", "tilebook prune --before 180d --yes"))
@OP
@GPU
@ORIGIN
@BEFORE
@DRY_RUN
@YES
@REGISTRY
def prune(
    op: str | None,
    gpu: str | None,
    origin: str | None,
    before: datetime | None,
    dry_run: bool,
    yes: bool,
    registry: str | None,
) -> None:
    """Removes what no longer serves: verdicts and trials of kernels as they were. Then the file shrinks.

    With --before also trials that are older than that go, whatever they are of. Verdicts that may be served stay, as
    do revocations and what programs asked for.
    """
    from tilebook.registry.filewriter import writer
    from tilebook.registry.maintenance import Wanted, shrink, tidy
    from tilebook.registry.selection import Selection
    from tilebook.registry.target import Locked

    wanted = [Wanted(Selection(op=op, gpu=gpu, origin=origin), retired=_retired())]
    if before is not None:
        wanted.append(Wanted(Selection(op=op, gpu=gpu, origin=origin, before=before), verdicts=False))
    chosen = _carry_out(registry, wanted, dry_run, yes)
    if not chosen:
        click.echo("nothing is there that no longer serves")
    if not dry_run:
        target = _own(registry)
        with writer(target) as writing:
            tidy(writing)
        try:
            freed = shrink(target)
        except Locked:  # what was to be removed is
            click.echo("tilebook: the file keeps its size, since another process is at work on it", err=True)
            return
        if freed >= 100_000:
            click.echo(f"the file is {freed / 1e6:.1f} MB smaller", err=True)


def _carry_out(registry: str | None, wanted: Sequence[Wanted], dry_run: bool, yes: bool) -> Chosen:
    """Says what would go, asks, and removes it; returns what fits."""
    from tilebook.registry.filereader import reader
    from tilebook.registry.filewriter import writer
    from tilebook.registry.maintenance import choose
    from tilebook.registry.maintenance import remove as removed

    target = _own(registry)
    with reader(target) as reading:
        chosen, label = choose(reading, wanted), reading.label
    for line in _told(chosen):
        click.echo(line)
    if not chosen or dry_run:
        return chosen
    if not yes:
        what = _counted(len(chosen.verdicts), len(chosen.trials))
        click.confirm(f"Remove {what} from {label}?", abort=True, err=True)
    with writer(target) as writing:
        chosen = removed(writing, wanted)
    click.echo(f"{_counted(len(chosen.verdicts), len(chosen.trials))} removed from {label}", err=True)
    return chosen


def _own(registry: str | None) -> str:
    """The registry that commands change: the one that is named, else the user's."""
    from tilebook.registry import Layers
    from tilebook.registry.target import user_folder

    first, target = Layers.default(registry).layers[0]
    if first == "shipped":
        user_folder()  # says why there is no user's
    return target


def _retired() -> tuple[Retired, Retired]:
    from tilebook.report.retired import is_retired, is_retired_trial

    return is_retired, is_retired_trial


def _told(chosen: Chosen) -> Iterator[str]:
    """A line for each op and GPU."""
    verdicts, trials = (
        Counter((_shown(each.op), _shown(each.device)) for each in some) for some in (chosen.verdicts, chosen.trials)
    )
    for op, device in sorted({*verdicts, *trials}):
        yield f"{op} on {device}: {_counted(verdicts[op, device], trials[op, device])}"


def _shown(name: object) -> str:
    """A name as it stands in a table, which nobody has checked: escaped where it is none."""
    from tilebook.registry.checks import label, quoted

    try:
        return label(name, "name")
    except ValueError:
        return quoted(name)


def _counted(verdicts: int, trials: int) -> str:
    def named(count: int, what: str) -> str:
        return f"{count:,} {what}{'' if count == 1 else 's'}"

    return f"{named(verdicts, 'verdict')} and {named(trials, 'trial')}"
