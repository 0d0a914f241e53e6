"""`tilebook profile`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from tilebook import machine
from tilebook.cli.common import REGISTRY, Seconds, as_json, example, main, unheard
from tilebook.variables import ASKED, PROFILED

if TYPE_CHECKING:
    from tilebook.report.profile import Profile


@main.command(
    context_settings={"allow_interspersed_args": False},
    epilog=example(
        "tilebook profile -- python train.py --lr 1e-4", "tilebook profile --seconds 60 --tune -- python train.py"
    ),
)
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND [ARGUMENT]...")
@click.option(
    "--seconds",
    type=Seconds(),
    metavar="TIME",
    help="End the program so long (60s, 5m; a bare number is of seconds) after its first call.",
)
@click.option("--calls", type=click.IntRange(min=1), help="End the program after so many calls.")
@click.option("--json", "file", type=click.File("w", "utf-8", lazy=False), help="Write all of it there, too.")
@click.option("--tune", is_flag=True, help="Tune what is heaviest, then run the program once more.")
@click.option(
    "--budget",
    type=Seconds(),
    metavar="TIME",
    help="With --tune: end the tune after about this time (180s, 5m; a bare number is of seconds).",
)
@REGISTRY
def profile(
    command: tuple[str, ...],
    seconds: float | None,
    calls: int | None,
    file: TextIO | None,
    tune: bool,
    budget: float | None,
    registry: str | None,
) -> None:
    """Runs a program with tilebook on and says what its calls take, who serves them and what tuning may bring.

    Nothing is tuned and nothing runs otherwise than with TILEBOOK=1. Output, input and exit status are the program's;
    the table goes to stderr. It is of the time after the first, compiling calls. Without --seconds or --calls the
    program runs to its end; with one of them it is interrupted as by Ctrl-C then, and the exit status is 0.

    With --tune the heaviest problems without a verdict are tuned until 95 % of the time of all calls has one.
    """
    status, before = _run(command, seconds, calls, registry)
    found: dict[str, Any] = {} if before is None else before.data()
    wanted = before.wanted() if tune and before is not None else []
    if wanted:
        from tilebook.report.live import view
        from tilebook.tuner.run import tune_problems

        problems, weights = [(each.op, each.problem) for each in wanted], [each.weight_s for each in wanted]
        done = tune_problems(problems, registry=registry, budget_s=budget, weights=weights, watch=view)
        if done.interrupted:
            raise KeyboardInterrupt
        status, after = _run(command, seconds, calls, registry)
        if after is not None and before is not None:
            found = {"before": found, "after": after.data()}
            if before.step_ms and after.step_ms:
                ratio = before.step_ms / after.step_ms
                click.echo(f"before {before.step_ms:.4g} ms a step, after {after.step_ms:.4g}: {ratio:.3f}x", err=True)
    elif tune and before is not None:
        click.echo("tilebook: nothing to tune: what can be has a verdict", err=True)
    if file is not None:
        file.write(as_json(found, indent=2) + "\n")
    raise SystemExit(status)


def _run(
    command: Sequence[str], seconds: float | None, calls: int | None, registry: str | None
) -> tuple[int, Profile | None]:
    """The program's exit status, and what it has noted, which is shown."""
    from tilebook.cli.child import run

    with tempfile.TemporaryDirectory(prefix="tilebook-profile-") as folder:
        Path(folder, "options.json").write_text(json.dumps({"seconds": seconds, "calls": calls}), encoding="utf-8")
        environment = {ASKED: "1", **os.environ, PROFILED: folder}
        if registry is not None:
            environment["TILEBOOK_REGISTRY"] = registry
        status = run(command, environment)
        written = [json.loads(each.read_text(encoding="utf-8")) for each in Path(folder).glob("[0-9]*.json")]
    if not any(each.get("problems") for each in written):
        click.echo(f"tilebook: {_nothing(written)}", err=True)
        return status, None
    from tilebook.report.profile import together

    found = together(written, registry)
    click.echo(found.text(), err=True)
    return (0 if found.limited else status), found


def _nothing(written: Sequence[dict[str, Any]]) -> str:
    """Why there is nothing to show."""
    silent = sum(each["state"] == "begun" for each in written)
    if not written:
        return "; ".join(filter(None, ["no process has imported torch beside tilebook", unheard()]))
    if failed := [each["why"] for each in written if each["state"] == "failed"]:
        return f"what was noted is lost: {failed[0]}"
    if silent:
        return f"no call was noted: {silent} of {len(written)} processes were killed, or left by os._exit or exec"
    none = "" if machine.present() else ", and PyTorch sees no GPU here"
    return f"the program called nothing on a GPU that tilebook has kernels for{none}"
