"""The commands that look at verdicts again on the GPU that is here: verify, audit."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tilebook.cli.common import FORMAT, REGISTRY, Op, Seconds, as_json, example, main

if TYPE_CHECKING:
    from tilebook.tuner.audit.run import Report
    from tilebook.tuner.audit.subjects import Bench, Finding, Subject

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--op", type=Op(), metavar="OP", help="Only verdicts of this op."),
    click.option("--gpu", "index", type=click.IntRange(min=0), help="The CUDA index of the GPU to use (default: 0)."),
    click.option(
        "--budget",
        type=Seconds(),
        metavar="TIME",
        help="End after about this time (180s, 5m; a bare number is of seconds);"
        " what is not reached stays as it is, and is said.",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Say what would be looked at, in which order; measure and write nothing."
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option(
        "--recorded",
        type=click.Path(exists=True, path_type=Path),
        multiple=True,
        metavar="PATH",
        help="In place of a GPU, the one that sweeps were recorded on: a file or a folder of them; repeatable.",
    ),
    click.option(
        "--kernels",
        type=click.Path(exists=True, path_type=Path),
        metavar="PATH",
        help="The record of other people's kernels, a file or a folder, for verdicts on them (default: the user's).",
    ),
    click.option(
        "--rules",
        type=click.Path(exists=True, path_type=Path),
        metavar="FILE",
        help="The rules by which these kernels' inputs are made, as `tilebook tune --rules` has them.",
    ),
    REGISTRY,
    FORMAT,
)


def _options(command: _Command) -> _Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@main.command(
    epilog=example("tilebook verify --op attention_fwd --budget 10m"),
)
@_options
def verify(**options: Any) -> None:
    """Verifies imported and stale verdicts on this GPU, and trusts what passes.

    Looked at are verdicts that are not trusted, and those measured with other versions of torch, cuDNN, Triton or the
    driver, what is worth most first. Each winner is verified as in a tune and timed, interleaved, with PyTorch's own
    call, the default config and two runners-up, in a process that can be killed. What passes is trusted and belongs to
    this environment from then on. A winner that is wrong, crashes or hangs is quarantined: revoked, with the reason.
    One that is slower here, twice, is demoted: what beat it serves. Of other people's kernels those are looked at whose
    calls were recorded, against their first config.

    Ctrl-C keeps what is done, and the same command goes on. Exit status: 1 where a verdict could not be checked.
    """
    _run("verify", **options)


@main.command(
    epilog=example("tilebook audit --budget 5m"),
)
@_options
def audit(**options: Any) -> None:
    """Looks for verdicts that an upgrade of torch, cuDNN or Triton made wrong or slow, and demotes those alone.

    Stale verdicts are looked at in a random order that prefers what programs use most, so that a short --budget looks
    at a sample. A first look verifies the winner and times it beside PyTorch's own call. Where the times are not as
    they were, it meets what could serve in its place, and is demoted where it loses twice, the second time in a fresh
    process. The like of what regressed is looked at next. What has not regressed stays as it is.

    Ctrl-C keeps what is done, and the same command goes on. Exit status: 1 where a verdict could not be checked.
    """
    _run("audit", **options)


def _run(
    by: str,
    *,
    op: str | None,
    index: int | None,
    budget: float | None,
    dry_run: bool,
    seed: int,
    recorded: Sequence[Path],
    kernels: Path | None,
    rules: Path | None,
    registry: str | None,
    format_: str,
) -> None:
    from tilebook import op as ops
    from tilebook.tuner.audit import run as auditing
    from tilebook.tuner.audit.subjects import Outcome

    here = _with_kernels(_bench(index, recorded), kernels, rules, registry)
    name = ops.get(op).name if op else None
    if dry_run:
        _print_plan(auditing.planned(by, here, op=name, registry=registry, seed=seed), here, format_)
        return
    report = auditing.look(by, here, op=name, registry=registry, budget_s=budget, seed=seed, watch=_tell)
    if format_ == "json":
        click.echo(as_json(_data(report), indent=2))
    else:
        _table(report)
    if report.interrupted:
        raise KeyboardInterrupt
    if any(each.outcome is Outcome.FAILED for each in report.findings):
        raise SystemExit(1)


def _bench(index: int | None, recorded: Sequence[Path]) -> Bench:
    from tilebook.op import UsageError
    from tilebook.tuner.audit import run as auditing

    if not recorded:
        return auditing.bench(index or 0)
    if index is not None:
        raise UsageError("give --gpu or --recorded, not both")
    from tilebook.tuner.sweeps import machines

    return machines.bench(recorded)


def _with_kernels(here: Bench, place: Path | None, rules: Path | None, registry: str | None) -> Bench:
    """With those of other people's kernels that verdicts here are on, as far as they were recorded."""
    from tilebook.foreign.names import is_foreign
    from tilebook.foreign.offered import offered
    from tilebook.foreign.record import folder
    from tilebook.registry import Device, Layers

    verdicts, _ = Layers.default(registry).read(device=Device(*here.gpu.identity))
    wanted = {verdict.op for _, verdict in verdicts if is_foreign(verdict.op)}
    if place is None and not (wanted and any(folder().glob("*.json"))):
        return here
    offer = click.get_current_context().with_resource(offered(place or folder(), rules, wanted))
    for line in offer.left_out:
        click.echo(f"tilebook: left out: {line}", err=True)
    own, found = here.ops, {each.name: each for each, _ in offer.problems}
    return replace(here, ops=lambda: {**own(), **found})


def _named(subject: Subject) -> dict[str, Any]:
    return {
        "op": subject.op.name,
        "problem": f"{subject.problem.label} {getattr(subject.problem, 'dtype', '')}".strip(),
        "winner": str(subject.winner),
        "layer": subject.layer,
        "because": list(subject.why),
        "weight_s": subject.weight,
    }


def _row(finding: Finding) -> dict[str, Any]:
    return {
        **_named(finding.subject),
        "outcome": finding.outcome.value,
        "reason": finding.reason or None,
        "served": finding.served or None,
        "rival": finding.rival or None,
        "ratio": finding.ratio,
        "ratio_before": finding.before,
        "seconds": round(finding.seconds, 3),
    }


def _data(report: Report) -> dict[str, Any]:
    return {
        "device": report.here.gpu.name,
        "environment": dict(report.here.environment),
        "layer": report.layer,
        "counts": _counts(report),
        "looked_at_before": report.before,
        "cannot_serve": report.left_out,
        "seconds": round(report.seconds, 3),
        "tuning_seconds": report.tuning_s,
        "verdicts": [_row(each) for each in report.findings],
    }


def _counts(report: Report) -> dict[str, int]:
    from tilebook.tuner.audit.subjects import Outcome

    found = Counter(each.outcome for each in report.findings)
    return {outcome.value: found[outcome] for outcome in Outcome}


def _tell(finding: Finding, number: int, total: int) -> None:
    """A line on stderr as soon as something came of a verdict."""
    row = _row(finding)
    because = f": {row['reason']}" if row["reason"] else ""
    click.echo(f"[{number}/{total}] {row['op']} {row['problem']}: {row['outcome']}{because}", err=True)


def _print_plan(found: Sequence[Subject], here: Bench, format_: str) -> None:
    rows = [_named(each) for each in found]
    if format_ == "json":
        click.echo(as_json(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['op']} {row['problem']}: {row['winner']} ({row['layer']}; {', '.join(row['because'])})")
    click.echo(f"{len(rows)} verdicts for {here.gpu.name} would be looked at, in this order", err=True)


def _table(report: Report) -> None:
    """For people: what needs an eye first, then what was kept, and the counts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from tilebook.tuner.audit.subjects import Outcome

    # Names and reasons may be a stranger's: nothing in them is markup.
    width = None if sys.stdout.isatty() else 160
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    order = [Outcome.QUARANTINED, Outcome.DEMOTED, Outcome.FAILED, Outcome.KEPT]
    shown = [each for outcome in order for each in report.findings if each.outcome is outcome]
    if shown:
        grid = Table(title=f"looked at on {report.here.gpu.name}", box=box.SIMPLE_HEAD, title_justify="left")
        grid.pad_edge, grid.collapse_padding = False, True
        grid.add_column("problem, winner", overflow="fold")
        grid.add_column("outcome", overflow="fold")
        grid.add_column("over", justify="right", no_wrap=True)
        grid.add_column("s", justify="right", no_wrap=True)
        for each in shown:
            grid.add_row(*_cells(_row(each)))
            grid.add_section()
        console.print(grid)
    for each in report.findings:
        if each.outcome is Outcome.NOT_REACHED:
            row = _row(each)
            console.print(f"not reached: {row['op']} {row['problem']}: {row['reason']}", soft_wrap=True)
    console.print(_summary(report), soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    because = ", ".join(row["because"])
    outcome = row["outcome"] + (f": {row['reason']}" if row["reason"] else "")
    if row["served"] and row["served"] != row["winner"]:
        outcome += f"\nserves now: {row['served']}"
    over = "–"
    if row["ratio"] is not None:
        was = "" if row["ratio_before"] is None else f"\nwas {row['ratio_before']:.2f}×"
        over = f"{row['ratio']:.2f}× {row['rival']}{was}"
    return [
        f"{row['op']} {row['problem']}\n{row['winner']}\n({row['layer']}; {because})",
        outcome,
        over,
        f"{row['seconds']:.1f}",
    ]


def _summary(report: Report) -> str:
    from tilebook.report.rows import seconds

    rest = f"; {report.before} were looked at before" if report.before else ""
    if report.left_out:
        why = "revoked, of source as it was, not recorded, or not able to run"
        rest += f"; {report.left_out} more cannot serve here: {why}"
    if not report.findings:
        return f"nothing to look at: no verdict for {report.here.gpu.name} asks for it{rest}"
    counts = _counts(report)
    text = f"{len(report.findings)} verdicts: " + ", ".join(f"{n} {name}" for name, n in counts.items())
    text += f"; {seconds(report.seconds)}"
    if report.tuning_s:
        text += f" (tuning them took {seconds(report.tuning_s)})"
    return text + rest
