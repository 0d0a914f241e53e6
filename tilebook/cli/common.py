"""What the commands share: the group they belong to, their common options, how rows are printed."""

from __future__ import annotations

import codecs
import io
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from tilebook.errors import one_line

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
FORMAT = click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)


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
    """The stream, or one in its place, on which whatever we print can be printed."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="tilebook.plain")
    if isinstance(stream, _Ascii) or codecs.lookup(stream.encoding).name != "ascii":
        return stream
    lines = stream.line_buffering
    return _Ascii(stream.detach(), encoding="ascii", errors="tilebook.plain", line_buffering=lines, write_through=True)


_EXTRA = ("alembic", "optuna", "rich")
"""Packages of the extra `tune`, without which models run but some commands do not."""


class _Tidy(click.Group):
    """A group whose expected errors are one line on stderr, without a traceback. It prints on any terminal."""

    def main(self, *args: Any, **more: Any) -> Any:
        sys.stdout, sys.stderr = _printable(sys.stdout), _printable(sys.stderr)
        return super().main(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        from tilebook.errors import TilebookError, UsageError

        def told(message: Warning | str, *_: Any, **__: Any) -> None:
            click.echo(f"tilebook: {one_line(message)}", err=True)

        try:
            with warnings.catch_warnings():
                warnings.showwarning = told
                return super().invoke(ctx)
        except UsageError as wrong:
            _fail(str(wrong), 2)
        except (TilebookError, OSError) as broken:
            _fail(str(broken), 1)
        except ModuleNotFoundError as missing:
            if missing.name not in _EXTRA:
                raise
            _fail(f"this command needs {missing.name}: pip install 'tilebook[tune]'", 1)
        except KeyboardInterrupt:
            _fail("interrupted; what was done is kept, and the same command goes on from there", 130)


def _fail(text: str, status: int) -> NoReturn:
    click.echo(f"tilebook: {one_line(text)}", err=True)
    raise SystemExit(status)


@click.group(cls=_Tidy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tilebook")
def main() -> None:
    """Finds the fastest correct way to run attention and MLPs on a GPU, keeps it, and serves it to model code."""


def print_rows(rows: Sequence[dict[str, Any]], format_: str, tuned: bool = False) -> None:
    if format_ == "json":
        click.echo(json.dumps(list(rows), indent=2))
        return
    from tilebook.report.rows import table

    table(rows, sys.stdout, tuned=tuned)
