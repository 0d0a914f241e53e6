"""What dispatch reads of the registries: the verdicts for one GPU, by op. Standard library only.

A SQLite file is read without SQLAlchemy, by an index, for this GPU and the op that is asked for: the samples and the
notes behind a verdict stay on the disk. SQLAlchemy is imported for a layer on PostgreSQL, and only then.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tilebook.errors import RegistryError
from tilebook.registry import legacy, sqlitefile
from tilebook.registry.checks import DAMAGE, quoted
from tilebook.registry.codec import revocation_from
from tilebook.registry.layers import Layers, Text, shipped_registry, standing, union
from tilebook.registry.records import Device, Revocation
from tilebook.registry.served import COLUMNS, FINALIST_COLUMNS, Finalist, Served, from_columns, of
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Locked, Target

__all__ = ["Finalist", "Served", "Table", "read"]

_T = TypeVar("_T")

READER_WAIT_S = 0.2  # a call of an op waits for it; a layer that stays locked is asked again with the next op


class Table:
    """The verdicts of all layers for one GPU, read op by op, and their revocations, read at once.

    problems: what is wrong with the layers, a line each; it may grow as ops are read.
    locked:   whether another process holds the lock of a layer, so that its rows are not here. They are asked for again
              with the next op; until then its revocations are not known either.

    Reading never raises: what cannot be read becomes a problem. No connection stays open between two calls.
    """

    def __init__(self, layers: Sequence[tuple[str, str]], device: Device) -> None:
        self._device = device
        self._layers = [layer for name, target in layers if (layer := self._layer(name, target)) is not None]
        self._verdicts: dict[tuple[str, str], list[Served]] = {}
        self._revocations: dict[str, list[Revocation]] = {}
        self.problems: list[str] = []
        self._read_revocations()

    @property
    def locked(self) -> bool:
        return any(layer.name not in self._revocations for layer in self._layers)

    @property
    def revocations(self) -> list[Revocation]:
        """Those of all layers together; the untrusted ones too."""
        return [each for _, each in union(self._revocations.items())]

    def verdicts(self, op: str) -> list[Served]:
        """One verdict for each problem and kernel of this op, the untrusted ones too; the first layer wins.

        But evidence goes first: a prediction does not hide a trusted measurement in a later layer, and a verdict that
        may not be served hides none that may.
        """
        if self.locked:
            self._read_revocations()
        best: dict[tuple[str, str], Served] = {}
        for layer in list(self._layers):
            place = layer.name, op
            if layer.name not in self._revocations:
                continue  # still locked: it was waited for just now
            if place not in self._verdicts:
                found = self._ask(layer, lambda layer=layer: layer.verdicts(op, self._device))  # type: ignore[misc]
                if found is None:
                    continue
                self._verdicts[place] = found
            for served in self._verdicts[place]:
                key = served.problem, served.kernel
                if key not in best or standing(served) > standing(best[key]):
                    best[key] = served
        return list(best.values())

    def _read_revocations(self) -> None:
        for layer in list(self._layers):
            if layer.name not in self._revocations:
                found = self._ask(layer, layer.revocations)
                if found is not None:
                    self._revocations[layer.name] = found

    def _layer(self, name: str, target: str) -> _Layer | None:
        """None for a layer that does not exist, or cannot be one."""
        try:
            parsed = Target.parse(target)
        except RegistryError as error:
            self._note([str(error)])
            return None
        if parsed.path is None:
            return _Database(name, target)
        if name == "shipped" and (text := shipped_registry(parsed.path)) is not None:
            return _Text(text)
        return None if name != "explicit" and not parsed.path.exists() else _File(name, parsed.path)

    def _ask(self, layer: _Layer, query: Callable[[], list[_T]]) -> list[_T] | None:
        """What a layer answers: None where it is locked, nothing where it is broken."""
        try:
            found = query()
        except Locked as error:
            self._note([str(error)])
            return None
        except Exception as error:  # whatever is wrong with it, the program that asks goes on
            self._note([str(error)])
            found = []
        self._note(layer.problems)
        return found

    def _note(self, problems: Sequence[str]) -> None:
        self.problems += [each for each in problems if each not in self.problems]


def read(device_name: str, arch: str, sm_count: int, explicit: str | None = None) -> Table:
    """The layers as they are now, for this GPU: `explicit`, else $TILEBOOK_REGISTRY; the user's; the one that ships."""
    return Table(Layers.default(explicit).layers, Device(device_name, arch, sm_count))


class _Layer(Protocol):
    """One registry; its answers raise RegistryError where there is none, and Locked where there may be one later."""

    name: str
    problems: list[str]

    def verdicts(self, op: str, device: Device) -> list[Served]: ...

    def revocations(self) -> list[Revocation]: ...


class _Database:
    """A layer on PostgreSQL, by way of SQLAlchemy."""

    def __init__(self, name: str, target: str) -> None:
        self.name, self._target = name, target
        self.problems: list[str] = []

    def verdicts(self, op: str, device: Device) -> list[Served]:
        from tilebook.registry.store import Registry

        with Registry.open(self._target) as registry:
            found = registry.verdicts(op=op, device=device)
            self.problems += registry.problems
        return [of(verdict, self.name) for verdict in found]

    def revocations(self) -> list[Revocation]:
        from tilebook.registry.store import Registry

        with Registry.open(self._target) as registry:
            found = registry.revocations()
            self.problems += registry.problems
        return found


class _Text:
    """What ships, where no file can be built from its text."""

    name = "shipped"

    def __init__(self, text: Text) -> None:
        self._text = text
        self.problems: list[str] = []

    def verdicts(self, op: str, device: Device) -> list[Served]:
        found = self._text.verdicts(op=op, device=device)
        self.problems += self._text.problems
        return [of(verdict, self.name) for verdict in found]

    def revocations(self) -> list[Revocation]:
        found = self._text.revocations()
        self.problems += self._text.problems
        return found


class _File:
    """A layer in a SQLite file."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self.problems: list[str] = []
        self._examined: tuple[int, int, int] | None = None
        self._schema = 0

    def verdicts(self, op: str, device: Device) -> list[Served]:
        with self._reading() as connection:
            read = _verdicts if self._schema >= 3 else _old_verdicts
            found = [*read(connection, self.name, op, device)]
        intact = [verdict for verdict in found if verdict is not None]
        if len(intact) < len(found):
            self.problems.append(f"registry {self._path}: left out {len(found) - len(intact)} damaged rows")
        return intact

    def revocations(self) -> list[Revocation]:
        with self._reading() as connection:
            if "revocation" not in sqlitefile.tables(connection):
                return []
            rows = connection.execute(_REVOCATIONS).fetchall()
        found = []
        for row in rows:
            revocation = _revocation(row)
            if revocation is not None:
                found.append(revocation)
            else:
                self.problems.append(f"registry {self._path}: {lost_revocation(str(row[1]))}")
        return sorted(found, key=lambda each: (each.created_at, each.scope))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with sqlitefile.explained(self._path), sqlitefile.readable(self._path) as place:
            connection = sqlitefile.connect(place, "ro", READER_WAIT_S)
            try:
                connection.execute("BEGIN")  # what belongs together is read of one state
                self._examine(connection, place)
                yield connection
            finally:
                connection.close()

    def _examine(self, connection: sqlite3.Connection, place: Path) -> None:
        """Looks at the file as a whole before anything of it is read: once, and again where it has changed."""
        found = place.stat()
        state = found.st_ino, found.st_mtime_ns, found.st_size
        if state == self._examined:
            return
        sqlitefile.refuse_foreign_schema(connection, self._path)
        self._schema = sqlitefile.check_version(connection, self._path, OLDEST_READABLE, SCHEMA_VERSION)
        if damage := sqlitefile.damage(connection, place):
            self.problems.append(f"registry {self._path}: the file is damaged ({damage}); rows may be missing")
        self._examined = state


def lost_revocation(scope: str) -> str:
    return (
        f"left out a damaged revocation: what it revokes may run again;"
        f" repeat it, or remove it with --undo {quoted(scope[:8])}"
    )


# A row whose environment or problem is gone must be counted as damaged rather than vanish.
_VERDICTS = f"""
SELECT v.id, v.served, p.op, p.key, {COLUMNS}
FROM device AS d JOIN kernel AS k ON k.op = ? JOIN verdict AS v ON v.device_id = d.id AND v.kernel_id = k.id
LEFT JOIN problem AS p ON p.id = v.problem_id LEFT JOIN environment AS e ON e.id = v.environment_id
WHERE d.name = ? AND d.arch = ? AND d.sm_count = ?
"""
_FINALISTS = f"""
SELECT f.verdict_id, f.place, {FINALIST_COLUMNS}
FROM device AS d JOIN kernel AS k ON k.op = ? JOIN verdict AS v ON v.device_id = d.id AND v.kernel_id = k.id
JOIN finalist AS f ON f.verdict_id = v.id
WHERE d.name = ? AND d.arch = ? AND d.sm_count = ?
ORDER BY f.verdict_id, f.place
"""
_REVOCATIONS = """
SELECT sha256, scope, op, implementation, kernel, arch, triton, config, reason, origin, trusted, created_at
FROM revocation
"""


def _verdicts(connection: sqlite3.Connection, layer: str, op: str, device: Device) -> Iterator[Served | None]:
    """Those for this device; None for each row that is damaged."""
    key = [op, device.name, device.arch, device.sm_count]
    finalists: dict[int, list[tuple[Any, ...]]] = {}
    for verdict, place, *values in connection.execute(_FINALISTS, key):
        its = finalists.setdefault(verdict, [])
        its.append(tuple(values) if place == len(its) else ())  # of one that is missing the digest will tell
    for verdict, sha256, of_problem, problem, *columns in connection.execute(_VERDICTS, key):
        known = of_problem == op and sha256 is not None
        yield from_columns(layer, op, problem, device, columns, finalists.get(verdict, []), sha256) if known else None


def _old_verdicts(connection: sqlite3.Connection, layer: str, op: str, device: Device) -> Iterator[Served | None]:
    """As `_verdicts`, of a file that no writer has brought to today's schema yet."""
    for row in connection.execute(legacy.ROWS):
        if tuple(row[2:5]) == (device.name, device.arch, device.sm_count) and op in (row[0], row[6]):
            verdict = legacy.verdict_or_none(row)
            yield None if verdict is None else of(verdict, layer)


def _revocation(row: Sequence[Any]) -> Revocation | None:
    """None where the row is damaged."""
    names = ["op", "implementation", "kernel", "arch", "triton", "config", "reason"]
    sha256, scope, *values, origin, trusted, created_at = row
    try:
        data = {**dict(zip(names, values, strict=True)), "created_at": created_at}
        data["config"] = json.loads(data["config"])
        if trusted not in (0, 1):
            return None
        revocation = revocation_from(data, origin=origin, trusted=bool(trusted))
    except DAMAGE:
        return None
    return revocation if (revocation.sha256, revocation.scope) == (sha256, scope) else None
