"""A file read with the standard library, against `Registry`, which reads the same."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry_samples import A100, H200, broken_trial, evidenced, miss, predicted, problem, revocation, trial, verdict

from tilebook.registry import Registry, RegistryError, Verdict
from tilebook.registry.filereader import FileReader
from tilebook.registry.overview import NOTES, Overview, overviews
from tilebook.registry.wanted import Wanted


@pytest.fixture
def filled(path: Path) -> Path:
    with Registry.open(path, write=True) as registry:
        registry.merge(
            [trial(1), broken_trial(), trial(2, op="other_op")],
            [
                verdict(),
                evidenced(problem=problem(2)),
                predicted(device=A100),
                verdict(op="other_op", trusted=False, origin="imported"),
            ],
            [revocation(), revocation(arch=None, trusted=False)],
        )
        registry.count_misses([miss(), miss(3, calls=7)])
    return path


def test_it_reads_what_the_registry_reads(filled: Path) -> None:
    with Registry.open(filled) as registry, FileReader.open(filled) as reading:
        assert reading.verdicts() == registry.verdicts() != []
        assert reading.trials() == registry.trials() != []
        assert reading.misses() == registry.misses() != []
        assert reading.misses(device=A100) == []
        assert reading.revocations() == registry.revocations() != []
        for some in ({"op": "other_op"}, {"problem": problem(2)}, {"device": A100}, {"kernel": "ab" * 8}):
            assert reading.verdicts(**some) == registry.verdicts(**some)
        assert reading.verdicts(gpu="nvidia a100") == registry.verdicts(device=A100)
        assert len(reading.verdicts(gpu="h200")) == 3
        assert reading.verdicts(gpu="H20") == []
        assert reading.problems == []


def test_rows_that_nobody_reads_to_the_end_may_outlive_their_reader(filled: Path) -> None:
    with FileReader.open(filled) as reading:
        half_read = [reading.each_trial(), reading.each_verdict(), reading.each_line()]
        assert all(map(next, half_read))
    for each in half_read:
        each.close()  # type: ignore[attr-defined]


DAMAGE = [
    "UPDATE verdict SET notes = '[' WHERE id = 1",
    "UPDATE verdict SET trusted = 0 WHERE id = 2",
    "UPDATE verdict SET served = 'ab' WHERE id = 2",
    "UPDATE finalist SET place = 7 WHERE place = 1",
    "UPDATE finalist SET is_default = 1 - is_default WHERE place = 2",
    "UPDATE trial SET reason = 'another' WHERE id = 1",
    "UPDATE trial SET created_at = 12 WHERE id = 2",
    "UPDATE miss SET calls = -1 WHERE id = 1",
    "UPDATE revocation SET reason = 'another' WHERE id = 1",
    "DELETE FROM device WHERE name LIKE '%H200%'",
    "UPDATE kernel SET op = 'third_op' WHERE id = 1",
    "UPDATE environment SET versions = x'ff00'",
]


@pytest.mark.parametrize("statement", DAMAGE)
def test_it_passes_over_the_damaged_rows_that_the_registry_passes_over(filled: Path, statement: str) -> None:
    with sqlite3.connect(filled) as database:
        database.execute(statement)
    with Registry.open(filled) as registry, FileReader.open(filled) as reading:
        assert reading.verdicts() == registry.verdicts()
        assert reading.trials() == registry.trials()
        assert reading.misses() == registry.misses()
        assert reading.revocations() == registry.revocations()
        assert reading.problems == registry.problems != []


SAME = "op problem device environment kernel status default_time_ms interval mode sources origin trusted created_at"


def told(found: Verdict | Overview) -> list[Any]:
    return [
        [getattr(found, name) for name in SAME.split()],
        {name: found.notes[name] for name in NOTES if name in found.notes},
        [(f.implementation, f.config, f.time_ms, f.predicted_ms, f.default) for f in found.finalists],
        [found.implementation, found.config, found.time_ms, found.measured, found.source_of("triton")],
    ]


def test_an_overview_says_what_the_verdict_says_but_for_the_samples(filled: Path) -> None:
    with FileReader.open(filled) as reading:
        assert list(map(told, overviews(reading))) == list(map(told, reading.verdicts()))
        for some in ({"op": "other_op"}, {"device": A100}, {"gpu": "a100"}, {"gpu": "none"}):
            assert list(map(told, overviews(reading, Wanted(**some)))) == list(map(told, reading.verdicts(**some)))
        assert reading.problems == []


SAMPLES = ["UPDATE finalist SET samples_ms = '[0.5]' WHERE id = 2", "UPDATE finalist SET again = '[]' WHERE id = 2"]


@pytest.mark.parametrize("statement", [*DAMAGE, *SAMPLES])
def test_an_overview_is_of_what_is_whole_alone(filled: Path, statement: str) -> None:
    with sqlite3.connect(filled) as database:
        database.execute(statement)
    with FileReader.open(filled) as reading, FileReader.open(filled) as other:
        assert list(map(told, overviews(reading))) == list(map(told, other.verdicts()))
        assert reading.problems == other.problems
        assert statement not in SAMPLES or reading.corrupt == 1


def test_it_refuses_what_the_registry_refuses(path: Path) -> None:
    def said(opened: type[FileReader] | type[Registry]) -> str:
        with pytest.raises(RegistryError) as refused:
            opened.open(path)
        return str(refused.value)

    assert said(FileReader) == said(Registry)
    for content in (b"", b"a letter", b"SQLite format 3\0" + bytes(300)):
        path.write_bytes(content)
        assert said(FileReader) == said(Registry)
    path.unlink()
    with Registry.open(path, write=True):
        pass
    for statement in ("DROP TABLE miss", "PRAGMA user_version = 99", "CREATE VIEW v AS SELECT 1"):
        with sqlite3.connect(path) as database:
            database.execute(statement)
        assert said(FileReader) == said(Registry)


def test_it_needs_no_sqlalchemy(filled: Path) -> None:
    text = f"""
import sys
from pathlib import Path
from tilebook.registry.filereader import FileReader
from tilebook.registry.overview import NOTES, Overview, overviews
with FileReader.open(Path({str(filled)!r})) as reading:
    assert reading.verdicts(gpu={H200.name!r}) and reading.trials() and reading.misses() and reading.revocations()
print(*{{"sqlalchemy", "torch", "alembic"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout == "\n", done.stderr
