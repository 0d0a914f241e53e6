"""Verdicts as people are shown them: whole but for the samples, which are most of a row and are not parsed.

That a row is what was recorded is told all the same: its digest is over a text, and that text is put together again of
those that the columns hold.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tilebook.registry import served
from tilebook.registry.checks import DAMAGE, ConfigValue, Json, optional_number, parse_time
from tilebook.registry.contents import Contents
from tilebook.registry.notes import notes
from tilebook.registry.reading import JOINS, condition_of
from tilebook.registry.records import Device, Environment
from tilebook.registry.served import COLUMNS, FINALIST_COLUMNS
from tilebook.registry.sql import Sql
from tilebook.registry.texts import Columns, Text, finalist_text, text_of
from tilebook.registry.verdict import Speedup, Verdict, VerdictStatus, check_contest, slowness
from tilebook.registry.wanted import ANY, Wanted


@dataclass(frozen=True, slots=True)
class Candidate:
    """A finalist without its samples, see `verdict.Finalist`."""

    implementation: str
    config: Mapping[str, ConfigValue]
    time_ms: float | None
    predicted_ms: float | None
    default: bool


@dataclass(frozen=True, slots=True)
class Overview:
    """A verdict without samples and second contests, see `verdict.Verdict`; of the notes it has NOTES.

    said: the SHA-256 of all that the verdict says to others, see `difference.Told`.
    """

    op: str
    problem: str
    device: Device
    environment: Environment
    kernel: str
    status: VerdictStatus
    finalists: tuple[Candidate, ...]
    default_time_ms: float | None
    interval: Speedup | None
    mode: str
    sources: Mapping[str, str]
    notes: Mapping[str, Json]
    origin: str
    trusted: bool
    created_at: datetime
    said: str

    @property
    def winner(self) -> Candidate:
        return self.finalists[0]

    @property
    def implementation(self) -> str:
        return self.winner.implementation

    @property
    def config(self) -> Mapping[str, ConfigValue]:
        return self.winner.config

    @property
    def time_ms(self) -> float | None:
        return self.winner.time_ms

    @property
    def measured(self) -> bool:
        return self.status is not VerdictStatus.PREDICTED

    def source_of(self, implementation: str) -> str:
        """The digest of the source that this implementation had; the op's kernel where the verdict has no other."""
        return self.sources.get(implementation, self.kernel)


Shown = Verdict | Overview

NOTES = (
    "tried",
    "rejected",
    "infeasible",
    "seconds",
    "busy",
    "predicted_default_ms",
    "searches",
    "unmeasured",
    "unconfirmed",
    "observed",
    "made",
)
"""What is shown of how a verdict was found. Which points of a space were searched is not, and is most of the notes."""


def overviews(registry: Contents, wanted: Wanted = ANY) -> list[Overview]:
    """The verdicts of a registry that are wanted, in the order of their keys; what is damaged is told as by `verdicts`.

    Of a file with today's schema, or that of before.
    """
    with registry.reading() as sql:
        found = registry.intact(_each(sql, wanted))
    return sorted(found, key=lambda v: (v.op, v.problem, v.device.name, v.device.arch, v.device.sm_count, v.kernel))


def _each(sql: Sql, wanted: Wanted) -> Iterator[Overview | None]:
    if (condition := condition_of(sql, wanted, "v")) is None:
        return
    where, values = condition
    rows = sql.each(f"{_FINALISTS} {where} ORDER BY f.verdict_id, f.place", values)
    finalists = itertools.groupby(rows, key=operator.itemgetter(0))
    number, its = _next(finalists)
    for row in sql.each(f"{_VERDICTS} {where} ORDER BY v.id", values):
        while number is not None and number < row[0]:
            number, its = _next(finalists)
        try:
            yield _overview(row, its if number == row[0] else [])
        except DAMAGE:
            yield None


def _next(finalists: Iterator[tuple[int, Iterator[Any]]]) -> tuple[int | None, list[Sequence[Any]]]:
    number, rows = next(finalists, (None, iter(())))
    return number, list(rows)


_VERDICTS = f"""
SELECT v.id, p.op, p.key, d.name, d.arch, d.sm_count, k.op, v.default_time_ms, v.notes, v.created_at, v.sha256,
       v.served, {COLUMNS}
FROM verdict AS v {JOINS.format("v")}
"""
_FINALISTS = f"""
SELECT f.verdict_id, f.place, {", ".join(f"f.{name.strip()}" for name in FINALIST_COLUMNS.split(","))},
       f.predicted_ms, f.is_default, f.speedup, f.speedup_low, f.speedup_high, f.samples_ms, f.again
FROM finalist AS f JOIN verdict AS v ON v.id = f.verdict_id {JOINS.format("v")}
"""


def _overview(row: Sequence[Any], finalists: Sequence[Sequence[Any]]) -> Overview:
    _, op, problem, name, arch, sm_count, of, default_ms, its_notes, created_at, sha256, served_sha256, *columns = row
    if op != of or [each[1] for each in finalists] != list(range(len(finalists))):
        raise ValueError("a finalist is missing, or the kernel is another op's")
    device = _device(name, arch, sm_count)
    found = served.from_columns("", op, problem, device, columns, [each[2:6] for each in finalists], served_sha256)
    text = _text(row, finalists)
    if found is None or text.sha256(columns[-2], bool(columns[-1])) != sha256:
        raise ValueError("a digest is wrong")
    told = json.loads(its_notes)
    candidates = tuple(map(_candidate, found.finalists, finalists))
    status, ours, interval = (
        VerdictStatus(found.status),
        optional_number(default_ms, "default_time_ms"),
        _speedup(found.speedup, found.speedup_low, found.speedup_high),
    )
    check_contest(status, candidates, ours, interval)
    known = {tuple(each[2:4]) for each in finalists}
    if len(known) != len(finalists) or sorted(candidates[1:], key=slowness) != list(candidates[1:]):
        raise ValueError("the finalists are not in their order, or one stands twice")
    return Overview(
        op=op,
        problem=problem,
        device=device,
        environment=_environment(columns[0]),
        kernel=found.kernel,
        status=status,
        finalists=candidates,
        default_time_ms=ours,
        interval=interval,
        mode=found.mode,
        sources=found.sources,
        notes=notes({name: told[name] for name in NOTES if name in told}),
        origin=found.origin,
        trusted=found.trusted,
        created_at=parse_time(created_at, "created_at"),
        said=hashlib.sha256(text.portable.encode()).hexdigest(),
    )


def _candidate(found: served.Finalist, row: Sequence[Any]) -> Candidate:
    predicted_ms, default = optional_number(row[6], "predicted_ms"), row[7]
    if predicted_ms == 0 or default not in (0, 1):
        raise ValueError("a prediction of no time, or a flag that is none")
    _speedup(*row[8:11])
    return Candidate(found.implementation, found.config, found.time_ms, predicted_ms, bool(default))


def _speedup(*values: Any) -> Speedup | None:
    return None if values == (None, None, None) else Speedup(*values)


@functools.lru_cache(256)
def _device(name: Any, arch: Any, sm_count: Any) -> Device:
    return Device(name, arch, sm_count)


@functools.lru_cache(256)
def _environment(versions: str) -> Environment:
    found = Environment(json.loads(versions))
    if found.text != versions:
        raise ValueError("the environment is not in its normal form")
    return found


def _text(row: Sequence[Any], finalists: Sequence[Sequence[Any]]) -> Text:
    """The canonical JSON of `Verdict.content`, as the columns spell it."""
    _, op, problem, name, arch, sm_count, _, default_ms, its_notes, created_at, _, _, *columns = row
    versions, kernel, status, mode, *interval, sources, origin, trusted = columns
    told = Columns(
        op, problem, _device(name, arch, sm_count), _environment(versions), kernel, status, mode, default_ms,
        tuple(interval), sources, origin, bool(trusted), created_at, its_notes,
    )  # fmt: skip
    return text_of(told, (finalist_text(each[2:]) for each in finalists))
