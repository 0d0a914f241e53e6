"""The command that compares verdicts with the machine code of today's source: recheck."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilebook.cli.common import example, main

if TYPE_CHECKING:
    from tilebook.recheck import Finding


@main.command(epilog=example("tilebook recheck --gpu H200 --check"))
@click.option("--gpu", metavar="NAME", help="Only verdicts for GPUs whose name has these words.")
@click.option("--all", "everything", is_flag=True, help="Also verdicts whose source is today's.")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 where something would be.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile (default: one a core).")
@click.option("--registry", metavar="PATH", help="Registry file or SQLAlchemy URL (default: what the package ships).")
def recheck(gpu: str | None, everything: bool, check: bool, jobs: int | None, registry: str | None) -> None:
    """Compiles what verdicts are of, for their GPUs, with none at hand, and compares it with what was measured.

    Verdicts whose machine code is the same take the digests of today's source, however that is written. Those whose
    winner compiles to other code stay as they are, so dispatch passes over them: they are listed, to be measured anew.
    Code belongs to a version of Triton, so verdicts made with another than this one are skipped.

    Exit status: 1 if a verdict is retired, or would be changed with --check.
    """
    from tilebook import recheck as rechecking
    from tilebook.registry import Layers, RegistryError
    from tilebook.registry.checks import called
    from tilebook.registry.layers import SHIPPED

    target = registry or str(SHIPPED)
    layers = Layers([("shipped" if registry is None else "explicit", target)])
    found = [v for _, v in layers.verdicts() if not gpu or called(gpu, v.device.name)]
    if layers.problems:
        raise RegistryError(layers.problems[0])
    findings: list[Finding] = []
    for each in rechecking.recheck(found, everything=everything, workers=jobs):
        findings.append(each)
        _tell(each)
    outcomes = [each.outcome for each in findings]
    counts = {name: outcomes.count(name) for name in ("current", "renewed", "retired", "skipped")}
    click.echo(", ".join(f"{n} {name}" for name, n in counts.items()), err=True)
    renewed = [each for each in findings if each.after is not None]
    if renewed and not check:
        _save(target, renewed, shipped=registry is None)
    raise SystemExit(1 if counts["retired"] or (check and renewed) else 0)


def _tell(finding: Finding) -> None:
    """A line for a verdict that is not as it was, and one for each of its finalists that is to be measured anew."""
    from tilebook import op as ops
    from tilebook.op import Config

    verdict = finding.verdict
    if finding.outcome == "current":
        return
    op = ops.ops().get(verdict.op)
    label = op.problem.from_key(verdict.problem).label if op else verdict.problem
    click.echo(f"{finding.outcome}: {verdict.op} {label} on {verdict.device.name}{_because(finding.reason)}")
    for each in finding.changed:
        why = "compiles to other code" if each.code else "was kept without its code"
        click.echo(f"  to be measured: {each.implementation} {Config(each.config)} {why}")


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _save(target: str, renewed: list[Finding], *, shipped: bool) -> None:
    """Puts renewed verdicts in the place of what they were. A user's registry keeps the old ones too, which dispatch
    passes over; what the package ships is written anew."""
    from tilebook import registry as store
    from tilebook.registry import shipped as shipping

    after = [each.after for each in renewed if each.after is not None]
    if not shipped:
        with store.Registry.open(target, write=True) as registry:
            registry.merge(verdicts=after)
        return
    before = {each.verdict.sha256 for each in renewed}
    layers = store.Layers([("shipped", target)])
    found, revocations = layers.read()
    rest = [verdict for _, verdict in found if verdict.sha256 not in before]
    shipping.write(Path(target), [*rest, *after], [revocation for _, revocation in revocations])
