"""A file read with the standard library, against `Registry`, which reads the same."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from registry_samples import A100, H200, broken_trial, evidenced, miss, predicted, problem, revocation, trial, verdict

from tilebook.registry import Registry, RegistryError
from tilebook.registry.filereader import FileReader


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
        assert reading.verdicts(gpu="nvidia a1") == registry.verdicts(device=A100)
        assert len(reading.verdicts(gpu="h200")) == 3
        assert reading.verdicts(gpu="H20 ") == []
        assert reading.problems == []


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
with FileReader.open(Path({str(filled)!r})) as reading:
    assert reading.verdicts(gpu={H200.name!r}) and reading.trials() and reading.misses() and reading.revocations()
print(*{{"sqlalchemy", "torch", "alembic"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout == "\n", done.stderr
