"""Configs that others have found for their kernels: a tune tries them first. They are candidates, and never verdicts.

Read are Triton's own `*.autotune.json`, triton-dejavu's storage, flash-linear-attention's files, the tables of fused
MoE kernels (vLLM, SGLang, Hugging Face's kernels) and AOTriton's SQLite databases. Files are anybody's: they are read
within limits, and what is no config in them is passed over.
"""

from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import stat
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tilebook.errors import UsageError, one_line
from tilebook.op import Config, Op, Space, Value
from tilebook.registry import checks

_MOST_FILES, _MOST_BYTES, _MOST_ROWS, _MOST_FOUND, _MOST_S = 20_000, 8 << 20, 200_000, 50_000, 60.0
_MOST = 16
"""Of one op, those that were named most often."""

_NUMBER = re.compile(r"-?\d{1,9}")
_OPTIONS = frozenset({"NUMWARPS", "NUMSTAGES", "NUMCTAS", "MAXNREG", "WAVESPEREU"})


@dataclass
class Hints:
    """found: (kernel, parameters) → how often a file has that as its choice; kernel is "" where it is not told.

    left_out: files that could not be read, and why.
    """

    found: Counter[tuple[str, tuple[tuple[str, Value], ...]]] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)

    def of(self, op: Op[Any], space: Space, default: Config) -> list[Config]:
        """Those for an op, on the nearest values of its axes; what they do not say is as by default."""
        kernel, made = op.name.rpartition(":")[2], Counter[Config]()
        axes = {_plain(axis): axis for axis in space.axes}
        for (name, values), count in self.found.items():
            if name not in ("", kernel):
                continue
            said = {axes[_plain(each)]: value for each, value in values if _plain(each) in axes}
            if set(map(_plain, said)) - _OPTIONS:
                nearest = {axis: _nearest(space.axes[axis], value) for axis, value in said.items()}
                made[space.config({**default, **nearest})] += count
        return [config for config, _ in made.most_common(_MOST)]


def read(place: Path) -> Hints:
    """The hints of a file, or of all files in a folder. Raises UsageError where there are none."""
    hints, until = Hints(), time.monotonic() + _MOST_S
    paths = _files(place)
    for number, path in enumerate(paths):
        if number == _MOST_FILES or len(hints.found) >= _MOST_FOUND or time.monotonic() > until:
            hints.left_out.append(f"{len(paths) - number} files: what is before them is enough")
            break
        try:
            # No link is followed below the folder, and a pipe would keep us waiting.
            if not stat.S_ISREG((path.stat() if path == place else path.lstat()).st_mode):
                continue
            for kernel, values in _aotriton(path, until) if path.suffix == ".sqlite3" else _json(path):
                usable = {str(name)[:64]: value for name, value in values.items() if _is_value(value)}
                if 0 < len(usable) <= checks.MAX_CONFIG:
                    hints.found[kernel, tuple(sorted(usable.items()))] += 1
                if len(hints.found) >= _MOST_FOUND:
                    break
        except (OSError, ValueError, ArithmeticError, RecursionError, sqlite3.Error) as wrong:
            hints.left_out.append(one_line(checks.text(f"{path}: {type(wrong).__name__}: {wrong}", "file"))[:300])
    if not hints.found:
        raise UsageError(
            f"{place}: no configs of kernels in it" + "".join(f"\n  {each}" for each in hints.left_out[:3])
        )
    return hints


def _files(place: Path) -> list[Path]:
    """Files that may have hints, in the order of their names."""
    if not place.exists():
        raise UsageError(f"{place}: there is no such file or folder")
    return [place] if not place.is_dir() else sorted(
        Path(folder, name)
        for folder, _, names in os.walk(place)
        for name in names
        if name.endswith((".json", ".sqlite3"))
    )  # fmt: skip


def _is_value(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and abs(value) < 1 << 31)


def _json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(kernel, parameters) of each choice in a file."""
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
    whole = json.loads(text)
    if not isinstance(whole, dict):
        raise ValueError("no table of configs")
    if isinstance(timed := whole.get("configs_timings"), list):
        kernel = path.name.removesuffix(".json").removesuffix(".autotune")
        best = min((each for each in timed if isinstance(each, list) and len(each) == 2), key=_time, default=None)
        if best is not None and _time(best) < math.inf:
            yield kernel, _config(best[0])
    elif isinstance(entries := whole.get("autotune_entries"), dict):
        kernel = str(whole.get("kernel_name", ""))[:200]
        for entry in entries.values():
            if isinstance(entry, dict):
                yield kernel, _config(entry.get("config"))
    elif isinstance(cache := whole.get("cache"), dict):
        for chosen in cache.values():
            yield "", _config(chosen)
    else:
        for size, chosen in whole.items():
            if _NUMBER.fullmatch(size):
                yield "", _config(chosen)


def _time(timed: Any) -> float:
    """The median of a config's times; infinite where it failed."""
    times = timed[1] if isinstance(timed[1], list) else [timed[1]]
    numbers = [each for each in times if isinstance(each, int | float) and each == each]
    return statistics.median(numbers) if numbers and len(numbers) == len(times) else math.inf


def _config(chosen: Any) -> Mapping[str, Any]:
    """A config's parameters: Triton's own fields, a flat table, or the text that `str(config)` makes."""
    if isinstance(chosen, str):
        pairs = (each.split(":", 1) for each in chosen[:4000].split(",") if ":" in each)
        return {name.strip(): int(value) for name, value in pairs if _NUMBER.fullmatch(value.strip())}
    if not isinstance(chosen, dict):
        return {}
    inner = chosen.get("kwargs")
    return {**inner, **chosen} if isinstance(inner, dict) else chosen


def _aotriton(path: Path, until: float) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of each row of AOTriton's tables, `FLASH$kernel`, the columns `tuned_kernel$…` and `compiler_options$…`."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        database.set_progress_handler(lambda: time.monotonic() > until, 10_000)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_BYTES)
        database.execute("PRAGMA trusted_schema = OFF")
        tables = database.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'")
        for (table,) in tables.fetchmany(1000):
            columns = [name for _, name, *_ in database.execute(f"PRAGMA table_info({_quoted(table)})")]
            wanted = [each for each in columns if each.startswith(("tuned_kernel$", "compiler_options$"))]
            if wanted:
                chosen = ", ".join(map(_quoted, wanted))
                for row in database.execute(f"SELECT {chosen} FROM {_quoted(table)} LIMIT {_MOST_ROWS}"):
                    yield "", {name.partition("$")[2]: value for name, value in zip(wanted, row, strict=True)}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@lru_cache(10_000)
def _plain(name: str) -> str:
    """BLOCK_SIZE_M, BLOCK_M and BM are one parameter."""
    plain = re.sub(r"SIZE|[^A-Z0-9]", "", name.upper())
    return re.sub(r"^B(LOCK)?(?=[A-Z]$)", "BLOCK", plain)


def _nearest(values: tuple[Value, ...], wanted: Value) -> Value:
    """The value of an axis that is nearest, numbers by their ratio."""

    def apart(value: Value) -> tuple[bool, float]:
        numbers = isinstance(value, int) and isinstance(wanted, int)
        return value != wanted, abs(math.log((abs(int(value)) + 0.5) / (abs(int(wanted)) + 0.5))) if numbers else 1.0

    return min(values, key=apart)
