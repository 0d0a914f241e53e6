"""What is asked of a registry's tables for dispatch: by index, on SQLite and PostgreSQL alike. Standard library only.

all that it holds for a GPU and an op      where that is little
the verdict on one problem, and the nearest where it is much: see `near`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tilebook.registry.near import SPOT, Bounds, Near, is_spot, nearest, place_of
from tilebook.registry.records import Device
from tilebook.registry.served import COLUMNS, FINALIST_COLUMNS, Served, from_columns

Execute = Callable[[str, Sequence[Any]], Sequence[Sequence[Any]]]
"""The rows of a statement with `?` for its parameters."""


@dataclass(frozen=True)
class Question:
    """What is asked about a problem that is new to a program.

    kernel:   the digest of the op's own kernel as it is now; verdicts of another do not count.
    most:     how many of the nearest problems that have verdicts to tell beside, none where there is one on this; those
              that are as near as the last are told too.
    distance: to another problem; infinite where its verdict cannot serve. reach: from where on none does.
    exact:    names of dimensions in which one that serves must be the same.
    halved:   names of dimensions of whose difference a distance may count no more than half.
    beside:   whether to tell of the nearest even where there is a verdict on this that may be served.
    """

    op: str
    kernel: str
    problem: str
    most: int = 0
    distance: Callable[[str], float] = field(default=lambda problem: float("inf"))
    reach: float = 0.0
    exact: frozenset[str] = frozenset()
    halved: frozenset[str] = frozenset()
    beside: bool = False

    def asks_near(self, exact: Served | None) -> bool:
        """Is it about the nearest too, where this is the verdict on the problem?"""
        return self.most > 0 and (self.beside or exact is None or not exact.trusted)

    def about(self, problem: str) -> Question:
        """The same about another problem, and about no other beside."""
        return replace(self, problem=problem, most=0)


@dataclass(frozen=True)
class Answer:
    """exact: the verdict on the problem itself. near: the nearest that may be served and their distances, nearest
    first, where that one may not. damaged: how many rows were met that cannot be read. complete: up to which distance
    all are told that there are."""

    exact: Served | None = None
    near: tuple[tuple[float, Served], ...] = ()
    damaged: int = 0
    complete: float = math.inf


_MOST_TIES = 16
_MOST_DAMAGED = 16

# SQLite takes tables that are joined by CROSS in this order. In another, and it knows no better, it goes through all
# verdicts for a device, whatever their ops: with a million for what the first look-up of every op would wait.
_OF = """
FROM kernel AS k CROSS JOIN device AS d CROSS JOIN verdict AS v
"""
_WHERE = "WHERE k.op = ? AND d.name = ? AND d.arch = ? AND d.sm_count = ? AND v.device_id = d.id AND v.kernel_id = k.id"

# A row whose environment or problem is gone must be counted as damaged rather than vanish.
_VERDICTS = f"""
SELECT v.id, v.served, p.op, p.key, {COLUMNS}
{_OF} LEFT JOIN problem AS p ON p.id = v.problem_id LEFT JOIN environment AS e ON e.id = v.environment_id {_WHERE}
"""
_FINALISTS = f"""
SELECT f.verdict_id, f.place, {FINALIST_COLUMNS}
{_OF} CROSS JOIN finalist AS f {_WHERE} AND f.verdict_id = v.id
ORDER BY f.verdict_id, f.place
"""
_HELD = f"""
SELECT count(*) FROM (
    SELECT 1 {_OF} {_WHERE} LIMIT ?
) AS found
"""
_IDS = """
SELECT d.id, k.id FROM device AS d, kernel AS k
WHERE d.name = ? AND d.arch = ? AND d.sm_count = ? AND k.op = ? AND k.digest = ?
"""
_VERDICT = f"""
SELECT v.id, v.served, {COLUMNS}
FROM problem AS p JOIN verdict AS v ON v.problem_id = p.id AND v.device_id = ? AND v.kernel_id = ?
JOIN kernel AS k ON k.id = v.kernel_id LEFT JOIN environment AS e ON e.id = v.environment_id
WHERE p.op = ? AND p.key = ?
"""
_ITS_FINALISTS = f"SELECT place, {FINALIST_COLUMNS} FROM finalist WHERE verdict_id = ? ORDER BY place"
_PROBLEM = "SELECT p.key FROM verdict AS v JOIN problem AS p ON p.id = v.problem_id WHERE v.id = ?"
_SPOTS = "FROM position WHERE device_id = ? AND kernel_id = ? AND form = ? AND spot >= ? AND spot < ? ORDER BY spot"
_POSITIONS = f"SELECT spot, verdict_id {_SPOTS} LIMIT ?"
_SPAN = f"""
SELECT (SELECT spot {_SPOTS} LIMIT 1), (SELECT spot {_SPOTS} DESC LIMIT 1), (SELECT spot {_SPOTS} LIMIT 1 OFFSET ?)
"""
_SOME = """
SELECT p.key FROM position AS s JOIN verdict AS v ON v.id = s.verdict_id JOIN problem AS p ON p.id = v.problem_id
WHERE s.device_id = ? AND s.kernel_id = ? ORDER BY s.form, s.spot LIMIT ?
"""


def holds_more(execute: Execute, op: str, device: Device, most: int) -> bool:
    """Does it hold more verdicts than that on the op for this device, of whichever kernel, trusted or not?"""
    ((found,),) = execute(_HELD, [*_key(op, device), most + 1])
    return bool(found > most)


def verdicts(execute: Execute, layer: str, op: str, device: Device) -> Iterator[Served | None]:
    """All on the op for this device; None for each row that is damaged."""
    key = _key(op, device)
    finalists: dict[int, list[Sequence[Any]]] = {}
    for verdict, place, *values in execute(_FINALISTS, key):
        its = finalists.setdefault(verdict, [])
        its.append(values if place == len(its) else ())  # of one that is missing the digest will tell
    for verdict, sha256, of_problem, problem, *columns in execute(_VERDICTS, key):
        known = of_problem == op and sha256 is not None
        its = finalists.get(verdict, [])
        yield from_columns(layer, op, problem, device, _plain(columns), its, sha256) if known else None


def answer(execute: Execute, layer: str, device: Device, question: Question) -> Answer:
    """What a registry says of a problem; of those that lie near only what may be served."""
    ids = execute(_IDS, [device.name, device.arch, device.sm_count, question.op, question.kernel])
    if not ids:
        return Answer()
    own = _verdict(execute, layer, device, ids[0], question.op, question.problem)
    exact, damaged = (own, 0) if isinstance(own, Served) else (None, int(own is False))
    if not question.asks_near(exact):
        return Answer(exact, damaged=damaged, complete=0.0)
    near: list[tuple[float, Served]] = []
    complete = math.inf
    for each in _nearest(execute, ids[0], question):
        if len(near) >= question.most and each.distance > near[-1][0]:
            complete = near[-1][0]
            break
        other = _verdict(execute, layer, device, ids[0], question.op, each.problem)
        if other is False and (damaged := damaged + 1) > _MOST_DAMAGED:
            break  # a program does not wait for a file to be gone through that has lost this many
        if isinstance(other, Served) and other.trusted:
            near.append((each.distance, other))
            if len(near) >= question.most + (_MOST_TIES if each.tied else 0):
                complete = each.distance
                break
    return Answer(exact, tuple(near), damaged, complete)


def some(execute: Execute, layer: str, device: Device, op: str, kernel: str, most: int) -> list[Served]:
    """So many of the verdicts on an op that may be served, whatever their problems."""
    ids = execute(_IDS, [device.name, device.arch, device.sm_count, op, kernel])
    problems = [problem for (problem,) in execute(_SOME, [*ids[0], most])] if ids else []
    found = (_verdict(execute, layer, device, ids[0], op, problem) for problem in problems)
    return [each for each in found if isinstance(each, Served) and each.trusted]


def _nearest(execute: Execute, ids: Sequence[int], question: Question) -> Iterator[Near]:
    place = place_of(question.problem)
    index = _Positions(execute, [*ids, place.form])
    bounds = Bounds(question.exact, question.halved, question.reach)
    found = nearest(place, bounds, index, question.distance, question.most)
    return (each for each in found if each.problem != question.problem)


@dataclass(frozen=True)
class _Positions:
    """The positions of one device, kernel and form as a `near.Index`."""

    execute: Execute
    key: Sequence[Any]

    def span(self, low: str, high: str, most: int) -> tuple[str, str, bool] | None:
        ((first, last, beyond),) = self.execute(_SPAN, [*[*self.key, low, high] * 3, most])
        if first is None:
            return None
        # What is damaged may stand before or behind all others: then they are anywhere in the range.
        first = first if is_spot(first) else low.ljust(SPOT, "0")
        return first, last if is_spot(last) else low.ljust(SPOT, "f"), beyond is not None

    def rows(self, low: str, high: str, most: int) -> Sequence[tuple[str, int]]:
        return self.execute(_POSITIONS, [*self.key, low, high, most])  # type: ignore[return-value]

    def problem(self, number: int) -> str:
        rows = self.execute(_PROBLEM, [number])
        return str(rows[0][0]) if rows else ""


def _verdict(
    execute: Execute, layer: str, device: Device, ids: Sequence[int], op: str, problem: str
) -> Served | bool | None:
    """None where there is none, False where it is damaged."""
    rows = execute(_VERDICT, [*ids, op, problem])
    if not rows:
        return None
    verdict, sha256, *columns = rows[0]
    finalists = execute(_ITS_FINALISTS, [verdict])
    its = [values if place == number else () for number, (place, *values) in enumerate(finalists)]
    return from_columns(layer, op, problem, device, _plain(columns), its, sha256) or False


def _key(op: str, device: Device) -> list[Any]:
    return [op, device.name, device.arch, device.sm_count]


def _plain(columns: Sequence[Any]) -> list[Any]:
    """COLUMNS as SQLite has them: flags are 0 and 1."""
    return [int(each) if isinstance(each, bool) else each for each in columns]
