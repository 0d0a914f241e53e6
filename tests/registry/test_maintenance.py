"""The commands that keep a registry in order: check, remove, prune."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from command_samples import OP, Run, left, today, tried
from registry_samples import A100, evidenced, miss, predicted, problem, revocation, trial, verdict

from tilebook.registry import Locked, Registry
from tilebook.registry.maintenance import NAMED_BY, PARTS, Wanted, choose, remove, tidy
from tilebook.registry.models import Base
from tilebook.registry.selection import Selection

REMOVALS = [
    (["--gpu", "a100"], (4, 4)),
    (["--gpu", "h200"], (1, 0)),
    (["--gpu", "H20"], (5, 4)),
    (["--op", "rms_norm_fwd"], (0, 0)),
    (["--op", "no_such_op"], (5, 4)),
    (["--dtype", "fp16"], (4, 4)),
    (["--origin", "imported"], (4, 3)),
    (["--before", "2026-06-01"], (4, 3)),
    (["--before", "2026-06-01", "--dtype", "bf16"], (5, 3)),
    (["--retired"], (4, 3)),
    (["--retired", "--gpu", "A100"], (5, 4)),
    (["--op", "rms_norm_fwd", "--only", "trials"], (5, 0)),
    (["--op", "rms_norm_fwd", "--only", "verdicts"], (0, 4)),
    (["--gpu", "%"], (5, 4)),
]


@pytest.mark.parametrize(("given", "stay"), REMOVALS, ids=[" ".join(given) for given, _ in REMOVALS])
def test_what_fits_all_that_is_given_is_removed_and_nothing_else(
    run: Run, mine: Path, given: list[str], stay: tuple[int, int]
) -> None:
    before = mine.read_bytes()
    told = run("remove", *given, "--dry-run").stdout
    assert mine.read_bytes() == before
    done = run("remove", *given, "--yes")
    assert (*stay, 1, 1) == left(mine)
    gone = f"{5 - stay[0]} verdict{'' if stay[0] == 4 else 's'} and {4 - stay[1]} trial{'' if stay[1] == 3 else 's'}"
    assert f"{gone} removed" in done.stderr if stay != (5, 4) else told == done.stdout == "nothing fits\n"
    assert run("check").stdout.endswith("whole\n")


def test_what_a_strangers_tables_hold_is_shown_escaped_and_ends_nothing(run: Run, mine: Path) -> None:
    with sqlite3.connect(mine) as database:
        database.execute("UPDATE device SET name = ? WHERE id = 1", ["\x1b[31mred\u202e\n"])
        database.execute("UPDATE problem SET op = x'00ff' WHERE id = 2")
        database.execute("UPDATE kernel SET digest = 12 WHERE id = 1")
        database.execute("UPDATE verdict SET sources = x'ff', created_at = 'soon' WHERE id = 1")
    for command in (["remove", "--dtype", "bf16", "--dry-run"], ["prune", "--dry-run"], ["show", "--trials"]):
        done = run(*command)
        assert not {"\x1b", "\u202e"} & set(done.stdout + done.stderr)
    assert "on '\\x1b[31mred" in run("remove", "--dtype", "bf16", "--dry-run").stdout
    run("check", status=1)
    run("remove", "--dtype", "bf16", "--yes")


@pytest.mark.parametrize("command", ["remove", "prune", "show", "diff user user", "export -"])
def test_what_is_no_name_of_an_op_is_wrong_usage(run: Run, mine: Path, command: str) -> None:
    for name in ("\udcff", "a b", "\x1b[2J"):
        assert "is no name of an op" in run(*command.split(), "--op", name, status=2).output


def test_nothing_is_removed_unasked(run: Run, mine: Path) -> None:
    assert "Remove 4 verdicts and 4 trials" in run("remove", "--gpu", "H200", input="n\n", status=1).stderr
    assert "Aborted" in run("remove", "--gpu", "H200", input="", status=1).stderr
    assert left(mine) == (5, 4, 1, 1)
    run("remove", "--gpu", "H200", input="y\n")
    assert left(mine) == (1, 0, 1, 1)
    assert "say what to remove" in run("remove", "--yes", status=2).stderr
    assert "no time such as" in run("remove", "--before", "soon", status=2).stderr


def test_where_there_is_no_registry_none_is_made(run: Run, tmp_path: Path) -> None:
    for command in (["remove", "--op", "x", "--yes"], ["prune", "--yes"]):
        assert "there is no registry" in run(*command, status=1).stderr
        assert run(*command, "--registry", tmp_path / "none.db", status=1).stderr.count("\n") == 1
    assert run("check").stdout == ""
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "none.db").exists()


def test_prune_takes_what_no_longer_serves_and_what_nothing_names(run: Run, mine: Path) -> None:
    assert "1 verdict and 1 trial" in run("prune", "--dry-run").stdout
    assert left(mine) == (5, 4, 1, 1)
    run("prune", "--yes")
    assert left(mine) == (4, 3, 1, 1)
    run("prune", "--yes", "--before", "2026-06-01")
    assert left(mine) == (4, 2, 1, 1)
    run("remove", "--op", OP.name, "--yes")
    run("prune", "--yes")
    with sqlite3.connect(mine) as database:
        counts = [database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("kernel", "environment")]
        assert counts == [0, 0]
        assert database.execute("SELECT count(*) FROM problem").fetchone() == (1,), "the ledger names one"
        assert database.execute("SELECT count(*) FROM finalist").fetchone() == (0,)


def test_prune_gives_room_back(run: Run, mine: Path) -> None:
    with Registry.open(mine, write=True) as registry:
        registry.merge([tried(number=n, kernel="cd" * 32, facts={"log": "x" * 3900}) for n in range(100)])
    size = mine.stat().st_size
    assert "MB smaller" in run("prune", "--yes").stderr
    assert mine.stat().st_size < size - 300_000


def test_a_file_that_somebody_else_uses_is_not_shrunk(run: Run, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(target: str) -> int:
        raise Locked("locked")

    monkeypatch.setattr("tilebook.registry.maintenance.shrink", locked)
    assert "keeps its size" in run("prune", "--yes").stderr
    assert left(mine) == (4, 3, 1, 1)


def test_removal_works_on_every_backend(registry: Registry) -> None:
    registry.merge([trial(), trial(1, device=A100)], [evidenced(), verdict(device=A100), predicted(problem=problem(2))])
    registry.count_misses([miss()])
    assert [each.device for each in choose(registry, [Wanted(Selection(gpu="a100"))]).verdicts] == [A100.name]
    assert len(choose(registry, [Wanted(Selection(measured=True))]).verdicts) == 2
    gone = remove(registry, [Wanted(Selection(gpu="a100")), Wanted(Selection(dtype="bf16"), trials=False)])
    assert (len(gone.verdicts), len(gone.trials)) == (3, 1)
    assert (registry.verdicts(), registry.trials(), len(registry.misses())) == ([], [trial()], 1)
    assert tidy(registry) == 2, "the A100 and one problem"
    assert registry.trials() == [trial()]


def test_rows_are_named_by_the_tables_that_the_schema_has_refer_to_them() -> None:
    named_by: dict[str, set[str]] = {}
    for table in Base.metadata.tables.values():
        for key in table.foreign_keys:
            named_by.setdefault(key.column.table.name, set()).add(table.name)
    assert named_by.pop("verdict") == set(PARTS)
    assert named_by == {name: set(tables) for name, tables in NAMED_BY.items()}


DAMAGE = {
    "UPDATE verdict SET notes = '[' WHERE id = 1": "1 damaged verdicts",
    "UPDATE trial SET reason = 'another'": "4 damaged trials",
    "UPDATE miss SET calls = 99": "1 damaged problems asked for",
    "UPDATE trial SET time_ms = 9e999": "4 damaged trials",
    "UPDATE trial SET reason = x'00ff'": "4 damaged trials",
    "UPDATE finalist SET place = 3 WHERE id = 2": "1 damaged verdicts",
    "DELETE FROM environment": "refers to one of 'environment' that is not there",
    "DELETE FROM verdict WHERE id = 2": "refers to one of 'verdict' that is not there",
}


@pytest.mark.parametrize(("statement", "said"), DAMAGE.items(), ids=DAMAGE.keys())
def test_what_is_damaged_is_found_and_set_aside(run: Run, mine: Path, statement: str, said: str) -> None:
    assert run("check").stdout.endswith("whole\n")
    with sqlite3.connect(mine) as database:
        database.execute(statement)
    before = mine.read_bytes()
    assert said in run("check", status=1).stdout
    assert mine.read_bytes() == before
    assert "whole" in run("check", "--repair").stdout
    left(mine)
    kept = [
        json.loads(line, parse_constant=pytest.fail)
        for file in mine.parent.glob("*.damaged-*")
        for line in file.read_text().splitlines()
    ]
    assert all(each["table"] in ("verdict", "trial", "miss") for each in kept)
    assert bool(kept) == ("DELETE FROM verdict" not in statement)
    assert run("check").stdout.endswith("whole\n")


def test_a_damaged_revocation_is_left_to_who_wrote_it(run: Run, mine: Path) -> None:
    with sqlite3.connect(mine) as database:
        database.execute("UPDATE revocation SET reason = 'another'")
    assert "1 damaged revocations: see show" in run("check", status=1).stdout
    run("check", "--repair", status=1)
    assert "--undo" in run("show").stderr
    run("revoke", "--undo", revocation().scope[:8])
    run("check")


def test_pages_and_indexes_are_looked_at(run: Run, mine: Path, tmp_path: Path) -> None:
    with sqlite3.connect(mine) as database:  # a trial that is not in an index
        database.execute("PRAGMA writable_schema = ON")
        name = "ix_trial_problem_id_device_id_kernel_id"
        row = database.execute("SELECT * FROM sqlite_master WHERE name = ?", [name]).fetchone()
        database.execute("DELETE FROM sqlite_master WHERE name = ?", [name])
    with sqlite3.connect(mine) as database:
        database.execute("PRAGMA writable_schema = ON")
        database.execute("UPDATE trial SET kernel_id = kernel_id + 1 - 1, id = id + 100 WHERE id = 1")
        database.execute("INSERT INTO sqlite_master VALUES (?, ?, ?, ?, ?)", row)
    assert "the file itself: row 4 missing from index" in run("check", status=1).stdout
    assert run("check", "--repair").stdout.endswith("whole\n")
    assert left(mine) == (5, 4, 1, 1)
    (tmp_path / "letter.db").write_text("dear registry")
    told = run("check", "--registry", tmp_path / "letter.db", status=1).stdout
    assert "cannot be read" in told
    assert "not a SQLite database" in told


def test_check_reads_all_layers_or_the_one_that_is_named(run: Run, mine: Path, tmp_path: Path) -> None:
    shipped = tmp_path / "package" / "registry.db"
    with Registry.open(shipped, write=True) as registry:
        registry.record(verdict=today(origin="shipped"))
    assert [line.partition(" ")[0] for line in run("check").stdout.splitlines()] == ["user", "shipped"]
    assert run("check", "--registry", shipped).stdout == f"explicit {shipped}: 1 verdicts: whole\n"


def test_check_reads_postgresql_too(run: Run, postgres_target: str) -> None:
    with Registry.open(postgres_target, write=True) as registry:
        registry.merge([trial()], [verdict()])
    assert "1 verdicts, 1 trials: whole" in run("check", "--registry", postgres_target).stdout
