"""The small rows that records share: problems, devices, environments, kernels. Standard library only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from tilebook.registry.records import Device, Environment
from tilebook.registry.sql import Sql

_MOST_IDS = 20_000  # remembered


class Shared:
    """Their ids, in the caller's transaction; what is missing is added."""

    def __init__(self, sql: Sql) -> None:
        self._sql = sql
        self._ids: dict[tuple[Any, ...], int] = {}

    def find_problems(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Looks for many at a time, by op and key, that will be asked for."""
        if len(self._ids) > _MOST_IDS:
            self._ids.clear()
        missing = sorted(each for each in wanted if ("problem", *each) not in self._ids)
        self._sql.insert("problem", ("op", "key"), missing, unless_there=True)
        for op, group in itertools.groupby(missing, key=lambda each: each[0]):
            statement = 'SELECT "key", id FROM problem WHERE op = ? AND "key" IN'
            for key, number in self._sql.among(statement, [key for _, key in group], [op]):
                self._ids["problem", op, key] = number

    def problem(self, op: str, key: str) -> int:
        if ("problem", op, key) not in self._ids:
            self.find_problems([(op, key)])
        return self._ids["problem", op, key]

    def device(self, device: Device) -> int:
        place = "device", device.text
        if place not in self._ids:
            self._ids[place] = self._id("device", device.content())
        return self._ids[place]

    def kernel(self, op: str, digest: str) -> int:
        known = self._ids.get(("kernel", op, digest))
        return self._id("kernel", {"op": op, "digest": digest}) if known is None else known

    def environment(self, environment: Environment) -> int:
        place = "environment", environment.digest
        if place not in self._ids:
            number = self._id("environment", {"digest": environment.digest}, {"versions": environment.text})
            # A damaged text is mended by whoever holds the right one.
            self._sql.run("UPDATE environment SET versions = ? WHERE id = ?", [environment.text, number])
        return self._ids[place]

    def _id(self, table: str, columns: dict[str, Any], beside: dict[str, Any] | None = None) -> int:
        place = table, *columns.values()
        if place not in self._ids:
            row = {**columns, **(beside or {})}
            self._sql.insert(table, row, [list(row.values())], unless_there=True)
            where = " AND ".join(f'"{name}" = ?' for name in columns)
            ((number,),) = self._sql.rows(f"SELECT id FROM {table} WHERE {where}", list(columns.values()))
            self._ids[place] = number
        return self._ids[place]
