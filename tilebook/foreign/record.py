"""What a program's autotuned kernels were called with: noted while it runs, written when it ends, read for a tune."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilebook.errors import UsageError
from tilebook.foreign.call import Call, Rule, check_rules, noted
from tilebook.foreign.kernel import Kernel, Unfit, is_given, key_of
from tilebook.foreign.names import Key
from tilebook.op import Config
from tilebook.registry.checks import config as checked
from tilebook.registry.checks import problem
from tilebook.registry.target import user_folder

VERSION = 1
MOST_KERNELS, MOST_PROBLEMS, MOST_CALLS, MOST_KINDS = 512, 64, 4, 2
"""Kernels of a program, keys of a kernel, and calls of a key with other shapes that a record has; and how many more,
whose numbers alone are of another kind."""

_LOOKED_AT = 64  # calls of a key are compared with those before
_MOST_REASONS = 16  # why calls are left out, each in its own words
_MOST_BYTES = 64 << 20  # of a file
_PAUSE_S = 30.0  # between two writings of a program that has not ended


@dataclass
class Recorded:
    """One problem of a kernel: its key, its calls as they differ, and how many there were.

    ran: the config that the program's own autotuner chose; failed: those that could not run there.
    """

    key: str
    calls: list[Call] = field(default_factory=list)
    count: int = 0
    ran: Config | None = None
    failed: set[Config] = field(default_factory=set)

    @property
    def weight(self) -> float:
        """Bytes moved by all calls: what there is to gain."""
        return float(self.count * max((each.bytes for each in self.calls), default=0))

    @property
    def full(self) -> bool:
        return len(self.calls) == MOST_CALLS + MOST_KINDS

    def add(self, call: Call) -> bool:
        """Takes a call that is like none before, as long as there is room for its like; says whether it did."""
        shapes = {each.shapes for each in self.calls}
        more = len(self.calls) - len(shapes)
        if call.shapes not in shapes:
            wanted = len(shapes) < MOST_CALLS
        else:
            wanted = more < MOST_KINDS and call.kinds not in {each.kinds for each in self.calls}
        if wanted:
            self.calls.append(call)
        return wanted

    def content(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "calls": [each.content() for each in self.calls],
            "count": self.count,
            "ran": None if self.ran is None else dict(self.ran),
            "failed": [dict(each) for each in sorted(self.failed, key=lambda config: config.key)],
        }

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Recorded:
        ran = None if content["ran"] is None else Config(checked(content["ran"]))
        key, count = Key.from_key(problem(content["key"])).key, min(int(content["count"]), 1 << 60)
        made = cls(key, [], count, ran, {Config(checked(each)) for each in content["failed"]})
        for each in content["calls"][: 2 * (MOST_CALLS + MOST_KINDS)]:
            made.add(Call.of(each))
        return made


@dataclass
class Entry:
    """A kernel's part of a record. path: where its module was imported from, beside what every program has.

    configs: of its autotuner, in the order of the calls' grids. given: it has none, but a space from outside."""

    module: str
    name: str
    digest: str
    path: str
    configs: tuple[Config, ...]
    problems: dict[str, Recorded] = field(default_factory=dict)
    given: bool = False


def folder() -> Path:
    """Where records are kept that nobody has named a place for."""
    return user_folder() / "recorded"


class Recording:
    """A program's record, of this process. What cannot be written down is counted in `left_out`, by its reason."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = self._named()
        self._written = time.monotonic()
        self._kernels: dict[int, tuple[Kernel, Entry] | None] = {}
        self.tuners: list[Any] = []  # so that no two have the same id
        self._found: dict[tuple[int, tuple[Any, ...]], Recorded] = {}
        self.left_out: dict[str, int] = {}

    def _named(self) -> Path:
        return self._folder / f"{os.uname().nodename}-{os.getpid()}-{int(time.time())}.json"

    def note(self, tuner: Any, args: Sequence[Any], kwargs: Mapping[str, Any], searched: bool = True) -> None:
        """A call that has been made. Never raises. searched: did the autotuner try its configs for it?"""
        try:
            key = id(tuner), key_of(tuner, args, kwargs)
            found = self._found.get(key) or self._new(tuner, key)
            if found is None:
                return
            found.count += 1
            if found.count <= _LOOKED_AT and not found.full:
                self._look(self._kernel(tuner)[0], found, args, kwargs, searched)  # type: ignore[index]
        except Exception as broken:
            reason = str(broken) if isinstance(broken, Unfit) else f"{type(broken).__name__}: {broken}"
            reason = reason[:200]
            if reason not in self.left_out and len(self.left_out) >= _MOST_REASONS:
                reason = "other reasons"
            self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def _kernel(self, tuner: Any) -> tuple[Kernel, Entry] | None:
        if id(tuner) not in self._kernels:
            if len(self._kernels) >= MOST_KERNELS:
                raise Unfit(f"more than {MOST_KERNELS} kernels")
            self._kernels[id(tuner)] = None
            self.tuners.append(tuner)
            kernel = Kernel(tuner)
            if "<" in kernel.name or kernel.module == "__main__":
                raise Unfit(f"{kernel.module}:{kernel.name} is in no module that can be imported")
            path = _path(kernel.function.__module__)
            configs = tuple(kernel.configs)
            entry = Entry(kernel.module, kernel.name, kernel.digest, path, configs, given=is_given(tuner))
            self._kernels[id(tuner)] = kernel, entry
        return self._kernels[id(tuner)]

    def _new(self, tuner: Any, key: tuple[int, tuple[Any, ...]]) -> Recorded | None:
        """Nothing is kept of what is left out: a program may have any number of keys, and kernels."""
        if (known := self._kernel(tuner)) is None:
            return None
        kernel, entry = known
        if len(entry.problems) >= MOST_PROBLEMS:
            raise Unfit(f"more than {MOST_PROBLEMS} keys of a kernel")
        text = kernel.problem(key[1])
        found = self._found[key] = entry.problems.setdefault(text, Recorded(text))
        return found

    def _look(
        self, kernel: Kernel, found: Recorded, args: Sequence[Any], kwargs: Mapping[str, Any], searched: bool
    ) -> None:
        call = noted(kernel, args, kwargs)
        if not found.add(call):
            return
        best = getattr(kernel.tuner, "best_config", None)
        with contextlib.suppress(Unfit):
            found.ran = None if best is None else kernel.config(best)
        timings = (searched and getattr(kernel.tuner, "configs_timings", None)) or {}
        for config, times in timings.items():
            if min(times if isinstance(times, Iterable) else [times]) == float("inf"):
                found.failed.add(kernel.config(config))
        if time.monotonic() - self._written > _PAUSE_S:
            self.write()

    def entries(self) -> list[Entry]:
        entries = [each[1] for each in self._kernels.values() if each is not None]
        return [each for each in entries if any(problem.calls for problem in each.problems.values())]

    def write(self) -> None:
        """Into a file of this process, whole or not at all. What goes wrong is a warning."""
        self._written = time.monotonic()
        entries = self.entries()
        if not entries and not self.left_out:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write(self._file, entries, self.left_out)
        except Exception as broken:
            text = f"tilebook: what kernels were called with is not recorded: {type(broken).__name__}: {broken}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def forked(self) -> None:
        """Told in a process that was forked off: it has a file of its own, and the calls until now are its parent's."""
        self._file = self._named()
        self._found.clear()
        self.left_out.clear()
        for _, entry in filter(None, self._kernels.values()):
            entry.problems.clear()


def start(folder: Path) -> Recording:
    """A recording that is written when the program ends."""
    made = Recording(folder)
    atexit.register(made.write)
    os.register_at_fork(after_in_child=made.forked)
    return made


def _path(module: str) -> str:
    """The folder from which a program's own module is imported: no package's, and none that everybody has."""
    top = sys.modules.get(module.split(".")[0])
    file = getattr(top, "__file__", None)
    if module == "__main__" and getattr(top, "__spec__", None) is not None:  # by `python -m`, from this folder
        return os.getcwd()
    if file is None or "site-packages" in file:
        return ""
    place = Path(file).resolve().parent
    return str(place.parent if Path(file).name == "__init__.py" else place)


def write(file: Path, entries: Iterable[Entry], left_out: Mapping[str, int] | None = None) -> None:
    """Raises OSError."""
    kernels = [
        {
            "module": each.module,
            "name": each.name,
            "digest": each.digest,
            "path": each.path,
            "given": each.given,
            "configs": [dict(config) for config in each.configs],
            "problems": [problem.content() for problem in each.problems.values() if problem.calls],
        }
        for each in entries
    ]
    text = json.dumps({"tilebook_record": VERSION, "kernels": kernels, "left_out": dict(left_out or {})})
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def read(place: Path) -> list[Entry]:
    """The records in a file, or in all files of a folder, taken together. Raises UsageError where there is none.

    Of a kernel whose source or configs have changed the last one counts."""
    merged: dict[tuple[str, str], Entry] = {}
    left_out: dict[str, None] = {}
    for entry in (entry for file in _files(place) for entry in _entries(file, left_out)):
        known = merged.setdefault((entry.module, entry.name), entry)
        if (known.digest, known.configs, known.given) != (entry.digest, entry.configs, entry.given):
            merged[entry.module, entry.name] = entry  # what was recorded before is of another kernel
        elif known is not entry:
            for key, problem in entry.problems.items():
                _add(known.problems.setdefault(key, Recorded(key)), problem)
    if not merged:
        why = "; ".join(left_out) or "run your program with TILEBOOK_TRITON=record first"
        raise UsageError(f"no recorded kernels in {place}: {why}")
    return list(merged.values())


def _files(place: Path) -> list[Path]:
    """A record, or all of a folder, oldest first; what is no file, or no longer there, is passed over."""
    if place.is_file():
        return [place]
    found = []
    for file in place.glob("*.json"):
        with contextlib.suppress(OSError):
            if file.is_file():
                found.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(found)]


def _add(known: Recorded, other: Recorded) -> None:
    for call in other.calls:
        known.add(call)
    known.count += other.count
    known.ran = known.ran or other.ran
    known.failed |= other.failed


def _entries(file: Path, left_out: dict[str, None]) -> Iterator[Entry]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["tilebook_record"] != VERSION:
            raise ValueError(f"it is of version {content['tilebook_record']}, not {VERSION}: record it anew")
        left_out |= dict.fromkeys(content["left_out"])
        for each in content["kernels"]:
            problems = {made.key: made for made in map(Recorded.of, each["problems"])}
            configs = tuple(Config(checked(listed)) for listed in each["configs"])
            if any(len(call.grids) != len(configs) for problem in problems.values() for call in problem.calls):
                raise ValueError("a call has not a grid for each config")
            module, name, digest, path = (str(each[field]) for field in ("module", "name", "digest", "path"))
            yield Entry(module, name, digest, path, configs, problems, each.get("given") is True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as wrong:
        why = f"it has no {wrong}" if isinstance(wrong, KeyError) else wrong
        raise UsageError(f"{file} is no record of kernels: {why}") from None


def rules(file: Path | None) -> dict[str, dict[str, Rule]]:
    """How integer tensors are made, and what else inputs have to be like. Raises UsageError."""
    if file is None:
        return {}
    try:
        return check_rules(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as wrong:
        raise UsageError(f"{file} has no rules: {wrong}") from None
