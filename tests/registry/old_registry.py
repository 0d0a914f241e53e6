"""Registries with the schema of before, as an older tilebook left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from tilebook.registry import canonical, schema
from tilebook.registry.backend import make_engine
from tilebook.registry.records import digest_of
from tilebook.registry.target import APPLICATION_ID, Target

EXPORT = Path(__file__).parent / "data" / "version_1.jsonl"
"""Four verdicts that shipped once, one of each form that their evidence had."""

_COLUMNS = [
    "id",
    "sha256",
    "problem_id",
    "device_id",
    "environment_id",
    "kernel_id",
    "status",
    "implementation",
    "config",
    "time_ms",
    "default_time_ms",
    "speedup",
    "speedup_low",
    "speedup_high",
    "evidence",
    "origin",
    "trusted",
    "created_at",
]


def old_verdicts() -> list[dict[str, Any]]:
    """The portable content of the verdicts of EXPORT."""
    lines = [json.loads(line) for line in EXPORT.read_text().splitlines()[1:]]
    return [{name: value for name, value in line.items() if name not in ("type", "sha256")} for line in lines]


def make_old(target: str, contents: list[dict[str, Any]], version: int = 2, trusted: bool = True) -> None:
    """Creates a registry of this schema with these verdicts."""
    parsed = Target.parse(target)
    if parsed.path is not None:
        parsed.path.parent.mkdir(parents=True, exist_ok=True)
    with make_engine(parsed, write=True, create=True).begin() as connection:
        schema._upgrade(connection, f"{version:04}")
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={version}")
        for number, content in enumerate(contents, start=1):
            _insert(connection, number, content, trusted)


def _insert(connection: Connection, number: int, content: dict[str, Any], trusted: bool) -> None:
    versions = canonical(content["environment"])
    ids = {
        "problem_id": _id(connection, "problem", op=content["op"], key=content["problem"]),
        "device_id": _id(connection, "device", **content["device"]),
        "environment_id": _id(connection, "environment", digest=digest_of(content["environment"]), versions=versions),
        "kernel_id": _id(connection, "kernel", op=content["op"], digest=content["kernel"]),
    }
    row = {
        **content,
        **ids,
        "id": number,
        "sha256": digest_of({**content, "origin": "local", "trusted": trusted}),
        "config": canonical(content["config"]),
        "evidence": canonical(content["evidence"]),
        "origin": "local",
        "trusted": trusted,
    }
    statement = f"INSERT INTO verdict ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)})"
    connection.execute(text(statement), {name: row[name] for name in _COLUMNS})


def _id(connection: Connection, table: str, **columns: Any) -> int:
    where = " AND ".join(f'"{name}" = :{name}' for name in columns)
    find = text(f"SELECT id FROM {table} WHERE {where}")
    found = connection.execute(find, columns).scalar_one_or_none()
    if found is not None:
        return int(found)
    names, values = ", ".join(f'"{name}"' for name in columns), ", ".join(f":{name}" for name in columns)
    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), columns)
    return int(connection.execute(find, columns).scalar_one())
