"""The registry that ships: text in the exchange format that people review, and the file that is built from it.

    tilebook/shipped/nvidia-h200/attention_fwd.jsonl    a GPU's verdicts on an op
    tilebook/shipped/revocations.jsonl
    tilebook/registry.db                                built from them; in a wheel it stands alone

Standard library only: whatever builds a wheel builds the file too.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tilebook.errors import RegistryError
from tilebook.registry import lines
from tilebook.registry.checks import Json, canonical, time_text
from tilebook.registry.columns import revocation_columns
from tilebook.registry.near import position_columns
from tilebook.registry.records import Device, Revocation
from tilebook.registry.target import APPLICATION_ID, SCHEMA_VERSION
from tilebook.registry.texts import Written, columns, finalist_columns
from tilebook.registry.verdict import Verdict

_REVOCATIONS = "revocations.jsonl"


def text_of(path: Path) -> Path:
    """The folder of the text that the file at `path` is built from."""
    return path.with_name("shipped")


def ready(path: Path) -> Path | None:
    """The file at `path`, built first where the text says something newer; None where it cannot be, so that the text
    has to be read instead. Without text, `path` itself, be it there or not."""
    newest = _newest(text_of(path))
    if newest is None or _mtime(path) == newest:
        return path
    try:
        verdicts, revocations, problems = read(text_of(path))
        if problems:
            return None
        build(path, verdicts, revocations, newest)
    except (OSError, sqlite3.Error):  # a folder that nobody may write to, most often
        return None
    return path


def write(path: Path, verdicts: Iterable[Verdict], revocations: Iterable[Revocation]) -> int:
    """Writes what ships as the text beside `path`, and builds the file. Returns how many verdicts there are.

    Only what is trusted goes in. Which points of the spaces were searched stays behind: that is most of the evidence,
    and counts where a problem is tuned again, which starts from a registry of its own.
    """
    files: dict[str, tuple[list[Verdict], list[Revocation]]] = {}
    kept = [replace(each, origin="shipped", notes=_brief(each.notes)) for each in verdicts if each.trusted]
    for each in kept:
        files.setdefault(_file(each.device.name, each.op), ([], []))[0].append(each)
    revoked = [replace(each, origin="shipped") for each in revocations if each.trusted]
    if revoked:
        files[_REVOCATIONS] = ([], revoked)
    folder = text_of(path)
    for name, (some, others) in files.items():
        _replace(folder / name, "".join(lines.written(others, some)))
    for old in folder.glob("**/*.jsonl"):
        if str(old.relative_to(folder)) not in files:
            old.unlink()
    build(path, kept, revoked, _newest(folder))
    return len(kept)


def read(
    folder: Path, op: str | None = None, device: Device | None = None
) -> tuple[list[Verdict], list[Revocation], list[str]]:
    """The verdicts for this op and device, or all; the revocations; and a line for each file that cannot be read."""
    verdicts: list[Verdict] = []
    revocations: list[Revocation] = []
    problems = []
    where = _file("*" if device is None else device.name, "*" if op is None else op)
    for file in [*sorted(folder.glob(where)), *folder.glob(_REVOCATIONS)]:
        try:
            with file.open(encoding="utf-8", newline="\n") as stream:
                found = [
                    record.verdict if isinstance(record, Written) else record
                    for _, record in lines.read(stream, origin="shipped", trusted=True)
                ]
        except (OSError, RegistryError) as error:
            problems.append(f"what ships is damaged: {file}: {error}")
            continue
        verdicts += [each for each in found if isinstance(each, Verdict) and device in (None, each.device)]
        revocations += [each for each in found if isinstance(each, Revocation)]
    return verdicts, revocations, problems


def build(
    path: Path, verdicts: Iterable[Verdict], revocations: Iterable[Revocation], mtime_ns: int | None = None
) -> None:
    """Writes a registry that is whole or not there at all, as many processes as may do it. Raises OSError.

    mtime_ns: the time that the file gets, by which `ready` knows what it was built from.
    """
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".registry-", suffix=".db")
    os.close(handle)
    draft = Path(name)
    try:
        with contextlib.closing(sqlite3.connect(draft)) as connection:
            for statement in schema():
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            _fill(_Rows(connection), verdicts, revocations)
            connection.commit()
            connection.execute("VACUUM")
        draft.chmod(0o644)
        if mtime_ns is not None:
            os.utime(draft, ns=(mtime_ns, mtime_ns))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def schema() -> Iterator[str]:
    """The statements that make a SQLite registry of today's schema, as the migrations would."""
    from importlib import resources

    text = (resources.files("tilebook.registry") / "schema.sql").read_text()
    yield from filter(str.strip, text.split(";"))
    yield f"INSERT INTO tilebook_alembic_version VALUES ('{SCHEMA_VERSION:04}')"


class _Rows:
    """Inserts rows; the small ones that records share are made once."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._ids: dict[str, int] = {}

    def insert(self, table: str, columns: Mapping[str, Any]) -> int:
        values = [time_text(value) if isinstance(value, datetime) else value for value in columns.values()]
        names, marks = ", ".join(f'"{name}"' for name in columns), ", ".join("?" * len(columns))
        return self._connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values).lastrowid or 0

    def shared(self, table: str, **columns: Any) -> int:
        key = canonical([table, columns])
        if key not in self._ids:
            self._ids[key] = self.insert(table, columns)
        return self._ids[key]


def _fill(rows: _Rows, verdicts: Iterable[Verdict], revocations: Iterable[Revocation]) -> None:
    for verdict in verdicts:
        versions = canonical(verdict.environment.content())
        ids = {
            "problem_id": rows.shared("problem", op=verdict.op, key=verdict.problem),
            "device_id": rows.shared("device", **verdict.device.content()),
            "environment_id": rows.shared("environment", digest=verdict.environment.digest, versions=versions),
            "kernel_id": rows.shared("kernel", op=verdict.op, digest=verdict.kernel),
        }
        written = Written(verdict)
        number = rows.insert("verdict", {**ids, **columns(written)})
        for place, values in enumerate(written.finalists):
            rows.insert("finalist", {"verdict_id": number, **finalist_columns(values, place)})
        place_of = {"device_id": ids["device_id"], "kernel_id": ids["kernel_id"], **position_columns(verdict.problem)}
        rows.insert("position", {"verdict_id": number, **place_of})
    for revocation in revocations:
        rows.insert("revocation", revocation_columns(revocation))


def _file(device: str, op: str) -> str:
    """Where the text has a GPU's verdicts on an op; "*" for any."""
    gpu = device if device == "*" else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{gpu or '-'}/{op}.jsonl"


def _brief(notes: Mapping[str, Json]) -> dict[str, Json]:
    """Notes whose spaces say how many points were feasible, not which."""
    found = dict(notes)
    if isinstance(spaces := found.get("spaces"), Mapping):
        found["spaces"] = {name: _counted(space) for name, space in spaces.items()}
    if "space" in found:
        found["space"] = _counted(found["space"])
    return found


def _counted(space: Json) -> Json:
    if not isinstance(space, Mapping) or "feasible" not in space:
        return space
    digits = space["feasible"]
    whole = digits if isinstance(digits, str) else "".join(map(str, digits)) if isinstance(digits, list) else ""
    rest = {name: value for name, value in space.items() if name != "feasible"}
    return {**rest, "points": int(whole or "0", 16).bit_count()}


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _newest(folder: Path) -> int | None:
    """When the text changed last, ns; a file that went changes its folder. None without any."""
    return max(_mtimes(folder), default=None)


def _mtimes(folder: Path) -> Iterator[int]:
    try:
        with os.scandir(folder) as entries:
            yield os.stat(folder).st_mtime_ns
            for entry in entries:
                if entry.is_dir():
                    yield from _mtimes(Path(entry.path))
                else:
                    yield entry.stat().st_mtime_ns
    except OSError:
        return


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
