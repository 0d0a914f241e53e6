"""What dispatch reads of the registries: the verdicts for one GPU, by op. Standard library only.

A SQLite file is read without SQLAlchemy, by an index, for this GPU and the op that is asked for: the samples and the
notes behind a verdict stay on the disk. SQLAlchemy is imported for a layer on PostgreSQL, and only then.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tilebook.errors import RegistryError
from tilebook.registry import sqlitefile
from tilebook.registry.checks import ConfigValue, quoted
from tilebook.registry.codec import revocation_from, verdict_from
from tilebook.registry.layers import Layers, standing, union
from tilebook.registry.records import Device, Revocation, Verdict
from tilebook.registry.target import OLDEST_READABLE, SCHEMA_VERSION, Locked, Target

_T = TypeVar("_T")

READER_WAIT_S = 0.2  # a call of an op waits for it; a layer that stays locked is asked again with the next op


@dataclass(frozen=True, slots=True)
class Finalist:
    """A candidate that a verdict found right. `time_ms` is of one call, None where nothing was measured.

    code: the digest of its machine code; "" where it is not ours, or not known.
    """

    implementation: str
    config: Mapping[str, ConfigValue]
    time_ms: float | None
    code: str


@dataclass(frozen=True, slots=True)
class Served:
    """What dispatch needs of a verdict.

    problem:     canonical JSON. kernel: the digest of the op's own kernel when this was measured.
    sources:     the digest that each implementation of ours had then, or the package and version of others'.
    status:      "measured" (a candidate beat the default), "default" (the default won) or "predicted" (never run).
    mode:        how calls were timed: "graph" or "eager".
    trusted:     whether it may be served: whoever serves has to ask.
    layer:       where it was found. origin: who put it there.
    environment: versions of what it was measured with: torch, triton, cudnn …
    speedup:     default's time over winner's, with its 95 % interval; None where nothing was measured.
    finalists:   best first; the first is the winner.
    """

    op: str
    problem: str
    kernel: str
    sources: Mapping[str, str]
    status: str
    mode: str
    trusted: bool
    layer: str
    origin: str
    environment: Mapping[str, str]
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    finalists: tuple[Finalist, ...]

    @property
    def measured(self) -> bool:
        return self.status != "predicted"

    def source_of(self, implementation: str) -> str:
        """The digest of the source that this implementation had; the op's kernel where the verdict has no other."""
        return self.sources.get(implementation, self.kernel)


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


def served(verdict: Verdict, layer: str) -> Served:
    """What dispatch needs of a verdict that was read whole."""
    kernels = verdict.evidence.get("kernels")
    times = {_key(each): each.get("time_ms") for each in _candidates(verdict)}
    return Served(
        op=verdict.op,
        problem=verdict.problem,
        kernel=verdict.kernel,
        sources={k: v for k, v in kernels.items() if isinstance(v, str)} if isinstance(kernels, dict) else {},
        status=verdict.status.value,
        mode=str(verdict.evidence.get("mode", "graph")),
        trusted=verdict.trusted,
        layer=layer,
        origin=verdict.origin,
        environment=verdict.environment.versions,
        speedup=verdict.speedup,
        speedup_low=verdict.speedup_low,
        speedup_high=verdict.speedup_high,
        finalists=tuple(
            Finalist(name, config, times.get((name, _text(config))), "") for name, config in verdict.ranking()
        ),
    )


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
        return [served(verdict, self.name) for verdict in found]

    def revocations(self) -> list[Revocation]:
        from tilebook.registry.store import Registry

        with Registry.open(self._target) as registry:
            found = registry.revocations()
            self.problems += registry.problems
        return found


class _File:
    """A layer in a SQLite file."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path
        self.problems: list[str] = []
        self._examined: tuple[int, int, int] | None = None

    def verdicts(self, op: str, device: Device) -> list[Served]:
        with self._reading() as connection:
            rows = connection.execute(_VERDICTS, [op, op, device.name, device.arch, device.sm_count]).fetchall()
        found = [verdict for row in rows if (verdict := _verdict(row, op, device)) is not None]
        self._lost(len(rows) - len(found), "damaged rows")
        return [served(verdict, self.name) for verdict in found]

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
        sqlitefile.check_version(connection, self._path, OLDEST_READABLE, SCHEMA_VERSION)
        if damage := sqlitefile.damage(connection, place):
            self.problems.append(f"registry {self._path}: the file is damaged ({damage}); rows may be missing")
        self._examined = state

    def _lost(self, count: int, what: str) -> None:
        if count:
            self.problems.append(f"registry {self._path}: left out {count} {what}")


def lost_revocation(scope: str) -> str:
    return (
        f"left out a damaged revocation: what it revokes may run again;"
        f" repeat it, or remove it with --undo {quoted(scope[:8])}"
    )


# A row whose environment is gone must be counted as damaged rather than vanish.
_VERDICTS = """
SELECT p.key, k.digest, e.versions, v.status, v.implementation, v.config, v.time_ms, v.default_time_ms, v.speedup,
       v.speedup_low, v.speedup_high, v.evidence, v.origin, v.trusted, v.created_at, v.sha256
FROM device AS d JOIN problem AS p ON p.op = ? JOIN kernel AS k ON k.op = ?
JOIN verdict AS v ON v.problem_id = p.id AND v.device_id = d.id AND v.kernel_id = k.id
LEFT JOIN environment AS e ON e.id = v.environment_id
WHERE d.name = ? AND d.arch = ? AND d.sm_count = ?
"""
_REVOCATIONS = """
SELECT sha256, scope, op, implementation, kernel, arch, triton, config, reason, origin, trusted, created_at
FROM revocation
"""

# What bad values make of decoding: wrong types and texts, JSON that nests without end.
DAMAGE = (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError)


def _verdict(row: Sequence[Any], op: str, device: Device) -> Verdict | None:
    """None where the row is damaged."""
    names = [
        "status",
        "implementation",
        "config",
        "time_ms",
        "default_time_ms",
        "speedup",
        "speedup_low",
        "speedup_high",
        "evidence",
    ]
    problem, kernel, versions, *values, origin, trusted, created_at, sha256 = row
    try:
        data = dict(zip(names, values, strict=True))
        data |= {"config": json.loads(data["config"]), "evidence": json.loads(data["evidence"])}
        data |= {"op": op, "problem": problem, "kernel": kernel, "device": device.content(), "created_at": created_at}
        verdict = verdict_from({**data, "environment": json.loads(versions)}, origin=origin, trusted=_flag(trusted))
    except DAMAGE:
        return None
    return verdict if verdict.sha256 == sha256 else None


def _revocation(row: Sequence[Any]) -> Revocation | None:
    """None where the row is damaged."""
    names = ["op", "implementation", "kernel", "arch", "triton", "config", "reason"]
    sha256, scope, *values, origin, trusted, created_at = row
    try:
        data = {**dict(zip(names, values, strict=True)), "created_at": created_at}
        data["config"] = json.loads(data["config"])
        revocation = revocation_from(data, origin=origin, trusted=_flag(trusted))
    except DAMAGE:
        return None
    return revocation if (revocation.sha256, revocation.scope) == (sha256, scope) else None


def _flag(value: Any) -> bool:
    """SQLite's boolean."""
    if value not in (0, 1):
        raise ValueError(f"not a flag: {quoted(value)}")
    return bool(value)


def _candidates(verdict: Verdict) -> list[Any]:
    listed = verdict.evidence.get("candidates")
    found = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [{"implementation": verdict.implementation, "config": verdict.config, "time_ms": verdict.time_ms}, *found]


def _key(candidate: Mapping[str, Any]) -> tuple[str, str]:
    return str(candidate.get("implementation")), _text(candidate.get("config"))


def _text(config: Any) -> str:
    return json.dumps(config, sort_keys=True, default=dict)
