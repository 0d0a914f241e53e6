"""The lines of an export, read of a SQLite file in several processes where there are many.

The parent holds its lock all the while, so that nobody can change the file, asks for ids in the order of the export,
and writes. Other processes read the rows of so many of them, each on a connection of its own, and none where the file
at the place is not the one that the parent reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from datetime import datetime
from pathlib import Path
from typing import Any

from tilebook.registry import reading, sqlitefile, workers
from tilebook.registry.lines import TrialLine, trial_line
from tilebook.registry.selection import Selection
from tilebook.registry.sql import Sql
from tilebook.registry.wanted import Wanted

ALONE = 8_000
"""Records that are read by one process: a second or two."""

_BATCH = 64  # ids that another process gets at once; of these it has two
_WAIT_S = 0.2  # for a lock: a writer that waits for the parent to end lets nobody else begin

Batch = tuple[list[Any], int]
"""What was read of a batch of rows: what is selected, in order, and how many rows are damaged."""


def verdicts(sql: Sql, selection: Selection) -> Iterator[tuple[int, str | None]]:
    """The lines of the verdicts that are selected, in the order of their keys; None for each row that is damaged."""
    ids = reading.ids(sql, Wanted(op=selection.op, gpu=selection.gpu))
    for texts, lost in _read("verdicts", sql, ids, selection, _verdict_lines):
        yield from ((0, text) for text in texts)
        yield from ((0, None) for _ in range(lost))


def trials(sql: Sql, selection: Selection) -> Iterator[tuple[int, TrialLine | None]]:
    """Likewise, by op, problem and time."""
    ids = reading.trial_ids(sql, Wanted(op=selection.op))
    for texts, lost in _read("trials", sql, ids, selection, _trial_lines):
        yield from ((0, text) for text in texts)
        yield from ((0, None) for _ in range(lost))


def _read(
    job: str, sql: Sql, ids: Iterator[int], selection: Selection, read: Callable[[Sql, list[int], Selection], Batch]
) -> Iterator[Batch]:
    first = list(itertools.islice(ids, ALONE))
    every = itertools.chain(first, ids)
    if sql.file is None or len(first) < ALONE or not workers.count():
        yield from (read(sql, batch, selection) for batch in _batches(every, reading.BATCH))
        return
    path, *file = sql.file
    for batch, found in workers.mapped(job, (str(path), file, _told(selection)), _batches(every, _BATCH)):
        yield read(sql, batch, selection) if found is None else found


def _batches(ids: Iterator[int], most: int) -> Iterator[list[int]]:
    while batch := list(itertools.islice(ids, most)):
        yield batch


def _verdict_lines(sql: Sql, ids: list[int], selection: Selection) -> Batch:
    found = [line for _, line in reading.lines_of(sql, ids)]
    everything = selection.everything
    texts = [line.text for line in found if line is not None and (everything or selection.verdict(line))]
    return texts, found.count(None)


def _trial_lines(sql: Sql, ids: list[int], selection: Selection) -> Batch:
    found = [trial for _, trial in reading.trials_of(sql, ids)]
    return [trial_line(trial) for trial in found if trial is not None and selection.trial(trial)], found.count(None)


def _told(selection: Selection) -> list[Any]:
    return [each.isoformat() if isinstance(each, datetime) else each for each in astuple(selection)]


# In a process that helps


def verdicts_of(place: str, file: Iterable[int], told: Iterable[Any]) -> Callable[[list[int]], Batch]:
    """What reads batches of the file at a place, where it is this one."""
    sql, selection = _opened(place, file), _selection(*told)
    return lambda ids: _verdict_lines(sql, ids, selection)


def trials_of(place: str, file: Iterable[int], told: Iterable[Any]) -> Callable[[list[int]], Batch]:
    """Likewise."""
    sql, selection = _opened(place, file), _selection(*told)
    return lambda ids: _trial_lines(sql, ids, selection)


def _opened(place: str, file: Iterable[int]) -> Sql:
    from tilebook.registry.filereader import connected

    connection, _ = connected(Path(place), Path(place), _WAIT_S)
    if sqlitefile.identity(Path(place)) != tuple(file):
        raise ValueError("another file has come to this place")
    return Sql(connection)


def _selection(op: Any, gpu: Any, dtype: Any, since: str | None, before: str | None, *rest: Any) -> Selection:
    first, end = (None if text is None else datetime.fromisoformat(text) for text in (since, before))
    return Selection(op, gpu, dtype, first, end, *rest)
