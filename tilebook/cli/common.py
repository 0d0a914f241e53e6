"""What the commands share: the group they belong to, their common options, how rows are printed."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

import click

from tilebook.errors import meant, one_line

REGISTRY = click.option(
    "--registry", metavar="PATH", help="Registry file or SQLAlchemy URL (default: $TILEBOOK_REGISTRY, else the user's)."
)
SUITES = click.option(
    "--suite",
    "suites",
    metavar="NAME",
    multiple=True,
    help="A named list of problems: quick, seeds, fa …; repeatable (default: quick).",
)
GPU = click.option("--gpu", metavar="NAME", help="Only GPUs whose name has these words: H200, rtx 4090.")
DTYPE = click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Only problems of this dtype.")
FORMAT = click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)


class Op(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """The name of an op that records may be of, be it here or not."""

    name = "op"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from tilebook.registry import checks

        try:
            return checks.name(value, "it") if value else value
        except ValueError:
            self.fail(f"{checks.quoted(value)} is no name of an op", param, ctx)


OP = click.option("--op", type=Op(), metavar="OP", help="Only this op.")

_LONGEST_S = 3e9
"""About a century, for which a system still waits."""


class Seconds(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A duration above zero: 180s, 5m, 1h, or a number of seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip().lower()
        unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
        try:
            seconds = float(text[:-1]) * unit if unit else float(text)
        except ValueError:
            self.fail(f"{value!r} is not a duration such as 180s, 5m or 1h", param, ctx)
        if not 0 < seconds < float("inf"):
            self.fail(f"{value!r} is not a duration above zero", param, ctx)
        return min(seconds, _LONGEST_S)


class Moment(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A time: a date, a time of a day, or how long ago. In UTC, where it says nothing else."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        ago = re.fullmatch(r"(\d{1,6})\s*([mhdw])", str(value).strip().lower())
        try:
            if ago:
                unit = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}[ago[2]]
                return datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
            found = datetime.fromisoformat(str(value).strip())
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time such as 2026-11-01, 2026-11-01T12:00 or 30d (so long ago)", param, ctx)


SINCE = click.option(
    "--since", type=Moment(), metavar="TIME", help="Only what was made since then: 2026-11-01, or 30d for so long ago."
)
BEFORE = click.option(
    "--before", type=Moment(), metavar="TIME", help="Only what was made before: 2026-11-01, or 90d ago."
)
YES = click.option("--yes", "-y", is_flag=True, help="Do not ask first.")
MEASURED = click.option("--measured", is_flag=True, help="Only what was measured, no predictions.")


def example(*lines: str) -> str:
    """The end of a command's help."""
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])


def known_op(name: str | None) -> str | None:
    """The name of an op, or None. Raises UsageError for one that there is not."""
    from tilebook import inventory

    if name:
        inventory.get(name)
    return name


def is_problem(op: str, key: str) -> bool:
    """Whether the text is the key of a problem of this op, one that can be posed."""
    from tilebook import inventory

    try:
        inventory.get(op).problem.from_key(key).check()
    except (TypeError, ValueError):
        return False
    return True


_LINE = re.compile(r"(?:(.*): )?line (\d+): (.*)", re.DOTALL)
_MOST_NAMED = 3


def skipped(lines: Sequence[str]) -> None:
    """Says which records of files were left out: in one line those of a file of which the same is to be said."""
    alike: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        found = _LINE.fullmatch(line)
        file, number, why = found.groups() if found else (None, "", line)
        alike.setdefault((f"{file}: " if file else "", why), []).append(number)
    for (file, why), numbers in alike.items():
        number = numbers[0]
        more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
        named = f"line{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:_MOST_NAMED])}{more}: " if number else ""
        click.echo(f"tilebook: skipped: {file}{named}{why}", err=True)


# What we print beyond ASCII, where it cannot be printed.
_PLAIN = {
    "…": "...",
    "–": "-",
    "−": "-",
    "×": "x",
    "→": "->",
    "·": "*",
    "≤": "<=",
    "µ": "u",
    "━": "=",
    "╌": "-",
    "─": "-",
}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: what the terminal has no sign for becomes plain text."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(sign, "?") for sign in text), error.end


codecs.register_error("tilebook.plain", _plain)


class _Ascii(io.TextIOWrapper):
    """An ASCII stream by another name: click takes one that says so for a mistake, and writes UTF-8 into it."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "plain"


def _printable(stream: Any) -> Any:
    """The stream, or one in its place, on which whatever we print can be printed; nowhere, where it is closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="tilebook.plain")
    if isinstance(stream, _Ascii) or codecs.lookup(stream.encoding).name != "ascii":
        return stream
    lines = stream.line_buffering
    return _Ascii(stream.detach(), encoding="ascii", errors="tilebook.plain", line_buffering=lines, write_through=True)


_EXTRA = {**dict.fromkeys(("alembic", "optuna", "rich"), "alembic optuna rich"), "cryptography": "cryptography"}
"""Packages without which models run but some commands do not, and what to install then: tilebook is in no index."""


_SENTENCE = 1000
"""Letters that a command has in the list of all: what click cuts off by itself after 45 fills two lines instead."""


_NEEDED = ("sqlalchemy", "torch", "triton")
"""Packages that are missing only where a wheel was installed without what it needs."""


COMMANDS = {
    "audit": ("audit", "verify"),
    "bench": ("bench",),
    "compare": ("diff", "merge"),
    "doctor": ("doctor",),
    "exchange": ("export", "import"),
    "keys": ("keys",),
    "maintain": ("check", "prune", "remove", "repair"),
    "profile": ("profile",),
    "recheck": ("recheck",),
    "record": ("record",),
    "registry": ("explain", "revoke", "show", "status"),
    "tuning": ("sweep", "tune"),
}
"""The modules of `tilebook.cli` and the commands that each has. To load all takes as long as most commands."""

_READING = frozenset({"check", "diff", "doctor", "explain", "export", "keys", "revoke", "show", "status", "tune"})
"""Commands that are done, or lose nothing, when nobody reads on what they print; tune prints at its end."""

_HOME = {command: module for module, commands in COMMANDS.items() for command in commands}


class _Told(click.Group):
    """A group that has each command's first sentence as a whole in its help, and what may have been meant by others."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and name.isidentifier():
            ctx.fail(f"No such command {name!r}{meant(name, self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(_SENTENCE)) for name, each in found if each is not None])


class _Tidy(_Told):
    """A group whose expected errors are one line on stderr, without a traceback. It prints on any terminal.

    A command's module is imported when the command is asked for.
    """

    group_class = _Told

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_HOME)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _HOME:
            importlib.import_module(f"tilebook.cli.{_HOME[cmd_name]}")
        return super().get_command(ctx, cmd_name)

    def main(self, *args: Any, **more: Any) -> Any:
        sys.stdout, sys.stderr = _printable(sys.stdout), _printable(sys.stderr)
        return super().main(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        from tilebook.errors import TilebookError, UsageError

        def told(message: Warning | str, *_: Any, **__: Any) -> None:
            click.echo(f"tilebook: {one_line(message).removeprefix('tilebook: ')}", err=True)

        try:
            with warnings.catch_warnings():
                warnings.showwarning = told
                found = super().invoke(ctx)
                sys.stdout.flush()
                return found
        except UsageError as wrong:
            _fail(str(wrong), 2)
        except BrokenPipeError:
            if ctx.invoked_subcommand not in _READING:
                raise  # click ends without a word
            _hush()  # who reads has read enough
            raise SystemExit(0) from None
        except (TilebookError, OSError) as broken:
            _fail(str(broken), 1)
        except ModuleNotFoundError as missing:
            package = (missing.name or "").partition(".")[0]
            if package not in (*_EXTRA, *_NEEDED):
                raise
            _fail(f"this command needs {package}: pip install {_EXTRA.get(package, package)}", 1)
        except KeyboardInterrupt:
            _fail("interrupted; what was done is kept, and the same command goes on from there", 130)


def _hush() -> None:
    """Nobody reads stdout any more: what is still to be written there is not an error when the program ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(text: str, status: int) -> NoReturn:
    click.echo(f"tilebook: {one_line(text)}", err=True)
    raise SystemExit(status)


@click.group(
    cls=_Tidy,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example("tilebook tune --suite seeds", "tilebook show --help"),
)
@click.version_option(package_name="tilebook")
def main() -> None:
    """Finds the fastest correct way to run attention and MLPs on a GPU, keeps it, and serves it to model code."""


def as_json(data: Any, indent: int | None = None) -> str:
    """JSON for any reader: numbers that are not finite, which ratios of a stranger's numbers may be, are null."""
    try:
        return json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(rows: Sequence[dict[str, Any]]) -> None:
    """A list with a row a line: to be read by `jq` and `grep` alike, however many there are."""
    click.echo("[" + ",".join(f"\n{as_json(row)}" for row in rows) + ("\n]" if rows else "]"))


def print_rows(
    rows: Sequence[dict[str, Any]], format_: str, tuned: bool = False, nothing: str = "", brief: bool = False
) -> None:
    """nothing: what is said where there are no rows. tuned, brief: see `rows.table`."""
    if format_ == "json":
        print_json(rows)
        return
    if not rows and nothing:
        click.echo(nothing)
        return
    from tilebook.report.rows import table

    table(rows, sys.stdout, tuned=tuned, brief=brief)


def unheard() -> str:
    """Why no program of this Python loads tilebook by itself, "" if nothing is known against it."""
    from importlib import metadata

    if any(each.name == "tilebook" for each in metadata.entry_points(group="torch.backends")):
        return ""
    return "tilebook is found here, but not installed, so that PyTorch does not load it: install it with pip"
