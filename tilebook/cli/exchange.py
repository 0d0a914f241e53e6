"""The commands that move records: export, import."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilebook.cli.common import (
    DTYPE,
    GPU,
    MEASURED,
    OP,
    REGISTRY,
    SINCE,
    Seconds,
    example,
    is_problem,
    known_op,
    main,
    skipped,
)

if TYPE_CHECKING:
    from tilebook.registry.layers import Layers
    from tilebook.registry.lines import Gathered
    from tilebook.registry.selection import Selection
    from tilebook.registry.signing import Sign, Signature


@main.command(
    "export",
    epilog=example(
        "tilebook export verdicts.jsonl --no-trials",
        "tilebook export - --op rms_norm_fwd --gpu H200 --measured | gzip > h200.jsonl.gz",
        "tilebook export verdicts.jsonl --sign mine",
        "tilebook export studies.db --as optuna",
    ),
)
@click.argument("file", type=click.Path(allow_dash=True))
@OP
@GPU
@DTYPE
@SINCE
@MEASURED
@click.option("--trials/--no-trials", default=True, show_default=True, help="With every candidate that was tried.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["tilebook", "fla", "optuna"]),
    default="tilebook",
    show_default=True,
    help="fla: into the folder FILE, what won kernels of others, as flash-linear-attention reads it by FLA_CONFIG_DIR."
    " optuna: the trials, added to FILE as studies that optuna-dashboard opens.",
)
@click.option("--sign", metavar="KEY", help="Sign it: a key of `tilebook keys make`, or a file with one of OpenSSH's.")
@REGISTRY
def export_(
    file: str,
    op: str | None,
    gpu: str | None,
    dtype: str | None,
    since: datetime | None,
    measured: bool,
    trials: bool,
    form: str,
    sign: str | None,
    registry: str | None,
) -> None:
    """Writes a registry to FILE as JSON Lines, to be passed on and imported elsewhere; - is stdout.

    Without a record of one's own, what `show` shows is written. A file that is there is replaced if it is an export.
    Revocations go with it, those of the op where one is named. Who trusts the key of --sign serves what it says, so
    that what is not trusted here is left out.
    """
    from tilebook.cli.files import written
    from tilebook.errors import RegistryError, UsageError
    from tilebook.registry import signing
    from tilebook.registry.layers import Layers
    from tilebook.registry.selection import Selection

    selection = Selection(
        op=known_op(op), gpu=gpu, dtype=dtype, since=since, measured=measured, trusted=sign is not None
    )
    layers = Layers.default(registry)
    if sign is not None and form != "tilebook":
        raise UsageError(f"--sign is for exports of tilebook's own form, and cannot go with --as {form}")
    if file == "-" and form != "tilebook":
        raise UsageError(f"--as {form} writes to no stdout: name a {'folder' if form == 'fla' else 'file'}")
    if form == "fla":
        _as_fla(layers, selection, Path(file))
        return
    if form == "optuna":
        _as_optuna(layers, selection, Path(file).absolute())
        return
    first, target = layers.layers[0]
    by = None if sign is None else signing.signer(sign)
    own = first == "explicit" or (first == "user" and Path(target).exists() and _any_record(target))
    with written(file) as stream:
        gathered, problems = _gathered(layers, target if own else None, selection, trials, by and by[0])
        for problem in problems:
            click.echo(f"tilebook: {problem}", err=True)
        if not gathered.count:
            raise RegistryError(_no_record(selection, own and first == "user"))
        gathered.write(stream)
    signed = f", those that are trusted here, signed by {by[1]}" if by else ""
    if own and first == "user":
        signed += "; of your own registry alone, without what ships with tilebook"
    click.echo(f"{gathered.count} records written to {'stdout' if file == '-' else file}{signed}", err=True)


def _no_record(selection: Selection, own: bool) -> str:
    """Why an export would have nothing in it."""
    where = " of your own registry" if own else ""
    beside = "; what ships with tilebook is exported only where there is no record of your own" if own else ""
    if selection.trusted:
        return (
            f"no record{where} that fits is trusted here, and your key would have others trust it: nothing was written."
            f" `tilebook verify` measures what was imported, import --trust takes its word for it{beside}"
        )
    return f"no record{where} fits: nothing was written{beside}"


def _as_fla(layers: Layers, selection: Selection, folder: Path) -> None:
    """Writes what flash-linear-attention reads, and says what was left out."""
    from tilebook.cli.files import named
    from tilebook.errors import RegistryError
    from tilebook.foreign.fla import files

    found, left_out = files(filter(selection.verdict, (each for _, each in layers.read(op=selection.op)[0])))
    for line in left_out:
        click.echo(f"tilebook: left out: {line}", err=True)
    if not found:
        raise RegistryError("no measured verdict on a kernel of others fits: nothing was written")
    with named(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in found.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    click.echo(f"{len(found)} kernels written to {folder}", err=True)


def _as_optuna(layers: Layers, selection: Selection, file: Path) -> None:
    from tilebook.errors import RegistryError
    from tilebook.report.studies import write

    found = [each for _, each in layers.trials(op=selection.op, gpu=selection.gpu) if selection.trial(each)]
    for problem in layers.problems:
        click.echo(f"tilebook: {problem}", err=True)
    studies, new = write(file, found) if found or file.exists() else (0, 0)
    if not found:
        raise RegistryError("no trial fits: tunes keep trials, and what ships with tilebook has none")
    some = f"{new} new trial{'s' if new != 1 else ''} in {studies} stud{'ies' if studies != 1 else 'y'}"
    click.echo(f"{some} written to {file}", err=True)


def _any_record(target: str) -> bool:
    """A registry may have been made for what was refused, or for a miss."""
    from tilebook.registry.filereader import FileReader

    with FileReader.open(Path(target)) as source:
        return not source.empty()


def _gathered(
    layers: Layers, target: str | None, selection: Selection, trials: bool, sign: Sign | None
) -> tuple[Gathered, list[str]]:
    """What is selected of a registry, or of all layers, to be written; and what was wrong there."""
    from tilebook.registry import lines

    if target is not None:
        from tilebook.registry import exchange
        from tilebook.registry.filereader import reader

        with reader(target) as source:
            return exchange.gathered(source, sign, selection, trials), source.problems
    found, revoked = layers.lines(op=selection.op, gpu=selection.gpu)
    verdicts = sorted((each for _, each in found if selection.verdict(each)), key=lambda each: each.place)
    revocations = [each for _, each in revoked if selection.revocation(each)]
    return lines.gathered(revocations, (each.text for each in verdicts), (), sign), layers.problems


class _Megabytes(click.FloatRange):
    """A size above zero, of a number that is one."""

    def __init__(self) -> None:
        super().__init__(min=0, max=1e9, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if found != found:
            self.fail(f"{value!r} is no size", param, ctx)
        return found


class _Source(click.Path):
    """A file that is there, -, or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from tilebook.cli.files import is_url

        return value if is_url(str(value)) else super().convert(value, param, ctx)


@main.command(
    "import",
    epilog=example(
        "tilebook import verdicts.jsonl",
        "tilebook import - --trust < verdicts.jsonl",
        "tilebook import https://example.org/h200.jsonl --max-size 64 --timeout 30s",
    ),
)
@click.argument("file", type=_Source(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--trust/--no-trust",
    default=None,
    help="Serve its verdicts without verifying them here first, and honour its revocations"
    " (default: if it is signed by a key that you trust, see `tilebook keys`).",
)
@click.option("--max-size", type=_Megabytes(), default=256, show_default=True, help="Of a URL, MB.")
@click.option(
    "--timeout",
    type=Seconds(),
    metavar="TIME",
    default="60s",
    show_default=True,
    help="For a URL (30s, 2m; a bare number is of seconds).",
)
@REGISTRY
def import_(file: str, trust: bool | None, max_size: float, timeout: float, registry: str | None) -> None:
    """Merges FILE into the registry; - is stdin, and a file, http or https URL will do as well.

    What it says is not served until it is verified here, or with --trust. Nor are its revocations honoured without it.
    A file that is signed by a trusted key needs no --trust; one with a signature that is wrong is refused.
    """
    from tilebook import inventory
    from tilebook import registry as store
    from tilebook.cli.files import opened
    from tilebook.report.retired import is_retired

    layers = store.Layers.default(registry)
    with opened(file, int(max_size * 1e6), timeout) as stream, layers.sink() as target:
        try:
            report = store.load(target, stream, allowed=inventory.axes(), trust=trust, is_problem=is_problem)
        except UnicodeDecodeError:
            raise store.RegistryError(f"{file} is not UTF-8 text") from None
    skipped(report.skipped)
    done = f"{report.trials} trials and {report.verdicts} verdicts imported"
    if report.revocations:
        done += f", and {report.revocations} revocations" + ("" if report.trusted else ", not honoured without --trust")
    click.echo(done, err=True)
    if report.signature is not None:
        click.echo(_signed(report.signature), err=True)
    if retired := sum(map(is_retired, report.accepted)):
        click.echo(f"{retired} of the file's verdicts are retired: of kernels as they were, and not served", err=True)


def _signed(signature: Signature) -> str:
    """Who signed a file, for people."""
    from tilebook.errors import RegistryError

    if not signature.checked:
        return f"signed by {signature.key}, it says: to look at that, pip install cryptography"
    try:
        known = signature.trusted
    except RegistryError as error:  # said after an import that did not ask for it
        return f"signed by {signature.key}: {error}"
    if known is not None:
        return f"signed by {known}, which is trusted"
    return f"signed by {signature.key}, which is not trusted here: see `tilebook keys trust --help`"
