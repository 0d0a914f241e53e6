"""Tables of text: cells of several lines, the first column folded to what room there is, the others right-aligned."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TextIO

_WIDTH = 160
"""Columns where the output is no terminal."""

_LEAST = 24  # columns that the first column has, however wide the others are
_GAP = "  "


def draw(
    stream: TextIO,
    title: str,
    left: str,
    right: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    apart: bool = True,
) -> None:
    """Prints a table. left, right: the heads of the first column and of the others; rows: their cells.

    apart: with an empty line after each row, else after the last.
    """
    terminal = stream.isatty()
    width = shutil.get_terminal_size((_WIDTH, 0)).columns if terminal else _WIDTH
    bold = terminal and os.environ.get("TERM") != "dumb"
    stream.write(f"\x1b[1m{title}\x1b[0m\n" if bold else f"{title}\n")
    stream.writelines(f"{line.rstrip()}\n" for line in _lines(left, right, rows, width, apart))


def _lines(
    left: str, right: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], width: int, apart: bool
) -> Iterator[str]:
    widths = [len(head) for head in right]
    for _, cells in rows:
        widths = [max(known, *map(len, cell.split("\n"))) for known, cell in zip(widths, cells, strict=True)]
    room = max(_LEAST, width - sum(widths) - len(_GAP) * len(widths))
    folded = [(_folded(cell, room), [cell.split("\n") for cell in cells]) for cell, cells in rows]
    first = max([len(left), *(len(line) for lines, _ in folded for line in lines)])

    def put(line: str, cells: Sequence[str]) -> str:
        return _GAP.join([line.ljust(first), *(cell.rjust(n) for cell, n in zip(cells, widths, strict=True))])

    yield put(left, right)
    yield "─" * (first + sum(widths) + len(_GAP) * len(widths))
    for lines, columns in folded:
        for at in range(max(len(lines), *map(len, columns))):
            yield put(_at(lines, at), [_at(column, at) for column in columns])
        if apart:
            yield ""
    if not apart:
        yield ""


def _folded(cell: str, room: int) -> list[str]:
    return [part for line in cell.split("\n") for part in _fold(line, room)]


def _fold(line: str, room: int) -> list[str]:
    return [line] if len(line) <= room else textwrap.wrap(line, room, break_on_hyphens=False) or [""]


def _at(lines: Sequence[str], place: int) -> str:
    return lines[place] if place < len(lines) else ""
