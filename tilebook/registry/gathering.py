"""Registries and exports brought together in a new one. Which is named first makes no difference to what it holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tilebook.errors import RegistryError
from tilebook.registry.exchange import Allowed, import_rule, load
from tilebook.registry.filereader import reader
from tilebook.registry.filewriter import FileWriter
from tilebook.registry.sources import is_export, place


@dataclass
class Report:
    """What a merge made: how many records of each kind the new registry got.

    met:     how often two verdicts on the same problem met, of which the stronger stands.
    skipped: a line for each record of an export that was left out. problems: for each source that is not whole.
    """

    trials: int = 0
    verdicts: int = 0
    revocations: int = 0
    met: int = 0
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def merge(
    names: Sequence[str],
    into: Path,
    *,
    allowed: Allowed,
    is_problem: Callable[[str, str], bool],
    trust: bool | None = False,
) -> Report:
    """Makes the registry `into` of registries and exports, whole or not at all. Raises RegistryError where it exists.

    Records of registries stay what they are there, trusted or not. Those of exports are checked as by an import, see
    `load`, and trusted as `trust` says. Ledgers stay behind: they say what somebody runs.
    """
    if os.path.lexists(into):
        raise RegistryError(f"{into} is there already: merge makes a new registry, and changes none")
    draft = into.absolute().with_name(f".{into.name}.{os.getpid()}.partial")
    report = Report()
    try:
        registry = FileWriter.open(draft)
        assert registry is not None  # a new file
        for name in names:
            if is_export(name):
                _add_export(registry, name, report, allowed, is_problem, trust)
            else:
                _add_registry(registry, name, report)
        with registry.transaction() as sql:
            report.verdicts, report.revocations = (
                sql.rows(f"SELECT count(*) FROM {table}")[0][0] for table in ("verdict", "revocation")
            )
        _publish(draft, into)
    except RegistryError as error:
        raise RegistryError(str(error).replace(str(draft), str(into))) from error
    finally:
        for file in (draft, draft.with_name(draft.name + "-journal")):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
    return report


def _publish(draft: Path, into: Path) -> None:
    """Gives the file its name, unless somebody has given it to another meanwhile."""
    try:
        os.link(draft, into)
    except FileExistsError:
        raise RegistryError(f"{into} is there by now, made by somebody else") from None
    except OSError:  # a file system without links
        with contextlib.suppress(FileExistsError):
            into.touch(exist_ok=False)
            draft.replace(into)
            return
        raise RegistryError(f"{into} is there by now, made by somebody else") from None


def _add_export(
    registry: FileWriter,
    name: str,
    report: Report,
    allowed: Allowed,
    is_problem: Callable[[str, str], bool],
    trust: bool | None,
) -> None:
    with Path(place(name)).open(encoding="utf-8", newline="\n") as stream:
        done = load(registry, stream, allowed=allowed, trust=trust, is_problem=is_problem)
    refused = [line for line in done.skipped if line.startswith("line ")]
    report.skipped += [f"{name}: {line}" for line in refused]
    report.trials += done.trials
    report.met += len(done.skipped) - len(refused) + len(done.replaced)


def _add_registry(registry: FileWriter, name: str, report: Report) -> None:
    with reader(place(name)) as source:
        for origin in ("local", "imported"):
            report.trials += registry.pour(source.each_trial(origin=origin), rule=import_rule, origin=origin).trials
        merged = registry.pour(source.each_verdict(), rule=import_rule, origin="imported")
        report.met += len(merged.kept) + len(merged.replaced)
        registry.pour(source.revocations(), rule=import_rule, origin="imported")
        report.problems += source.problems
