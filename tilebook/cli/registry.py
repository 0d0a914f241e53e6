"""The commands that say what a registry has, and move it: show, explain, status, export, import, revoke."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from tilebook.cli.common import (
    DTYPE,
    FORMAT,
    GPU,
    MEASURED,
    OP,
    REGISTRY,
    SINCE,
    Seconds,
    as_json,
    example,
    is_problem,
    known_op,
    main,
    print_json,
    print_rows,
    skipped,
)

if TYPE_CHECKING:
    from tilebook.registry.layers import Layers
    from tilebook.registry.selection import Selection
    from tilebook.registry.signing import Sign, Signature

NOTHING = "no verdicts: run `tilebook tune` first"


@main.command(
    epilog=example("tilebook show --op attention_fwd --gpu H200", "tilebook show --since 7d --measured --format json")
)
@OP
@GPU
@DTYPE
@SINCE
@MEASURED
@click.option(
    "--trials", is_flag=True, help="Show trials instead: every candidate that was tried, and what came of it."
)
@REGISTRY
@FORMAT
def show(
    op: str | None,
    gpu: str | None,
    dtype: str | None,
    since: datetime | None,
    measured: bool,
    trials: bool,
    registry: str | None,
    format_: str,
) -> None:
    """Prints the verdicts of all layers: what dispatch would serve, from where, and how sure it is."""
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
    nothing = NOTHING if selection.everything else "no verdict fits"
    print_rows([row(verdict, layer, denied.winner(verdict)) for layer, verdict in wanted], format_, nothing=nothing)


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
    from tilebook.errors import UsageError
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
        count, problems = _written(layers, target if own else None, selection, trials, stream, by and by[0])
    for problem in problems:
        click.echo(f"tilebook: {problem}", err=True)
    signed = f", those that are trusted here, signed by {by[1]}" if by else ""
    click.echo(f"{count} records written to {'stdout' if file == '-' else file}{signed}", err=True)


def _as_fla(layers: Layers, selection: Selection, folder: Path) -> None:
    """Writes what flash-linear-attention reads, and says what was left out."""
    from tilebook.foreign.fla import files

    found, left_out = files(filter(selection.verdict, (each for _, each in layers.read(op=selection.op)[0])))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for line in left_out:
        click.echo(f"tilebook: left out: {line}", err=True)
    click.echo(f"{len(found)} kernels written to {folder}", err=True)


def _as_optuna(layers: Layers, selection: Selection, file: Path) -> None:
    from tilebook.report.studies import write

    found = [each for _, each in layers.trials(op=selection.op, gpu=selection.gpu) if selection.trial(each)]
    for problem in layers.problems:
        click.echo(f"tilebook: {problem}", err=True)
    studies, new = write(file, found)
    some = f"{new} new trial{'s' if new != 1 else ''} in {studies} stud{'ies' if studies != 1 else 'y'}"
    click.echo(f"{some} written to {file}", err=True)


def _any_record(target: str) -> bool:
    """A registry may have been made for what was refused, or for a miss."""
    from tilebook.registry.filereader import FileReader

    with FileReader.open(Path(target)) as source:
        return not source.empty()


def _written(
    layers: Layers, target: str | None, selection: Selection, trials: bool, stream: TextIO, sign: Sign | None
) -> tuple[int, list[str]]:
    """Exports what is selected of a registry, or of all layers; returns how many records, and what was wrong there."""
    from tilebook.registry import lines

    if target is not None:
        from tilebook.registry import exchange
        from tilebook.registry.filereader import reader

        with reader(target) as source:
            gathered, problems = exchange.gathered(source, sign, selection, trials), source.problems
        return gathered.write(stream), problems
    found, revoked = layers.lines(op=selection.op, gpu=selection.gpu)
    verdicts = sorted((each for _, each in found if selection.verdict(each)), key=lambda each: each.place)
    revocations = [each for _, each in revoked if selection.revocation(each)]
    gathered = lines.gathered(revocations, (each.text for each in verdicts), (), sign)
    return gathered.write(stream), layers.problems


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
@click.option("--timeout", type=Seconds(), metavar="TIME", default="60s", show_default=True, help="For a URL.")
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
        return f"signed by {signature.key}, it says: to look at that, pip install 'tilebook[sign]'"
    try:
        known = signature.trusted
    except RegistryError as error:  # said after an import that did not ask for it
        return f"signed by {signature.key}: {error}"
    if known is not None:
        return f"signed by {known}, which is trusted"
    return f"signed by {signature.key}, which is not trusted here: see `tilebook keys trust --help`"


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
        new, rows = revoking.revoke(layers, made)
        click.echo(as_json(rows, indent=2) if format_ == "json" else revoking.told(made, new, rows))
    else:
        rows = [revoking.row(layer, each) for layer, each in layers.revocations()]
        for problem in layers.problems:
            click.echo(f"tilebook: {problem}", err=True)
        text = "\n".join(map(revoking.line, rows)) or "no revocations"
        click.echo(as_json(rows, indent=2) if format_ == "json" else text)
