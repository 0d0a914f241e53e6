"""The commands that measure what is not tuned: bench crossover."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click

from tilebook.cli.common import Seconds, example, main

_LENGTHS = ",".join(str(1 << n) for n in range(8, 19))


class Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Whole numbers above zero, with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = str(value).split(",")
        if not all(each.strip().isdecimal() and int(each) for each in parts):
            self.fail(f"{value!r} is no list such as 256,1024,4096", param, ctx)
        return tuple(map(int, parts))


def _demand_place(out: Path) -> None:
    """Raises RegistryError where figures cannot be written, and UsageError where something else is: before hours of
    measuring."""
    from tilebook.cli.files import named
    from tilebook.errors import UsageError

    with named(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            try:
                ours = "crossover" in json.loads(out.read_text(encoding="utf-8"))
            except (ValueError, TypeError):
                ours = False
            if not ours:
                raise UsageError(f"{out} is there and has no figures of this command: it is left as it is")
        with out.open("a", encoding="utf-8"):
            pass


@main.group(epilog=example("tilebook bench crossover --head-dim 128"))
def bench() -> None:
    """Measures on this GPU how ways to compute compare that are not the same function."""


@bench.command(epilog=example("tilebook bench crossover", "tilebook bench crossover --head-dim 128 --out 128.json"))
@click.option("--lengths", type=Numbers(), default=_LENGTHS, show_default=True, help="Tokens of a sequence.")
@click.option("--head-dim", type=Numbers(), default="64,128", show_default=True, help="Widths of a head.")
@click.option("--heads", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--window", type=click.IntRange(min=1), default=1024, show_default=True, help="Tokens of the window.")
@click.option("--rounds", type=click.IntRange(min=2), default=7, show_default=True)
@click.option(
    "--seconds",
    type=Seconds(),
    metavar="TIME",
    help="Begin no further length after so long (60s, 5m; a bare number is of seconds).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write figures there, in the place of earlier ones; a plot beside them.",
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
def crossover(
    lengths: tuple[int, ...],
    head_dim: tuple[int, ...],
    heads: int,
    window: int,
    rounds: int,
    seconds: float | None,
    out: Path | None,
    device: str,
) -> None:
    """Says from which length on windows and linear attention are faster than exact attention.

    Causal, bf16, forward and with gradients, of batches of 32,768 tokens or one sequence. They compute different
    functions: what a model loses by them is not measured here. Of a GPU the lengths are kept in the user's data folder
    for `tilebook.attention(…, approx="auto")`.
    """
    from tilebook import device as devices
    from tilebook.errors import UsageError
    from tilebook.report import crossover as report
    from tilebook.report.plots import draw

    if device == "cuda" and not devices.present():
        raise UsageError("there is no GPU here; --device cpu tries the command")
    if out is not None:
        _demand_place(out)
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    for row in report.measured(lengths, head_dim, heads, window, device, rounds):
        rows.append(row)
        click.echo(report.line(row), err=True)
        if out is not None:
            where = devices.current().name if device == "cuda" else "cpu"
            document = {"device": where, "environment": dict(devices.environment()), "heads": heads, "rounds": rounds}
            document |= {"crossover": report.crossovers(rows), "results": rows}
            out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if time.monotonic() - begun > (math.inf if seconds is None else seconds):
            break
    click.echo(report.text(rows))
    if device == "cuda" and rows:
        from tilebook import approximation

        click.echo(f"kept in {approximation.keep(devices.current().name, report.crossovers(rows))}")
    if out is not None:
        draw(out, report.panels(rows))
