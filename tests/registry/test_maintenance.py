"""The commands that keep registries in order, compare them and bring them together."""

from __future__ import annotations

import itertools
import json
import shlex
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_samples import (
    A100,
    START,
    broken_trial,
    evidenced,
    miss,
    predicted,
    problem,
    revocation,
    signed,
    trial,
    verdict,
)

from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.cli.common import Moment
from tilebook.registry import Registry, Speedup, Trial, Verdict, export
from tilebook.registry.filereader import FileReader
from tilebook.registry.gathering import merge
from tilebook.registry.maintenance import Wanted, choose, remove, tidy
from tilebook.registry.selection import Selection

OP = ops.get("rms_norm_fwd")
H200 = devices.find("H200")
Run = Callable[..., Result]


def key(shape: str, dtype: str = "bf16") -> str:
    return OP.problem.parse(shape, dtype).key


def today(shape: str = "M64,N256", **changes: Any) -> Verdict:
    """A verdict of today's kernel."""
    config = dict(OP.tunable.space.default(OP.problem.parse("M64,N256", "bf16"), H200))
    return verdict(**{"problem": key(shape), "kernel": OP.digest, "config": config, **changes})


def tried(shape: str = "M64,N256", number: int = 0, **changes: Any) -> Trial:
    return trial(number, **{"problem": key(shape), "kernel": OP.digest, **changes})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command with an empty home, where no verdicts ship."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TILEBOOK_REGISTRY", raising=False)
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", tmp_path / "package" / "registry.db")

    def start(*arguments: object, status: int = 0, **more: Any) -> Result:
        result = CliRunner().invoke(main, [str(each) for each in arguments], **more)
        assert result.exit_code == status, result.output
        return result

    return start


@pytest.fixture
def mine(tmp_path: Path, run: Run) -> Path:
    """The user's registry: two GPUs, two dtypes, two origins, two sources, a year of age."""
    path = tmp_path / "data" / "tilebook" / "registry.db"
    old = START - timedelta(days=400)
    with Registry.open(path, write=True) as registry:
        registry.merge(
            [tried(), tried(number=1, created_at=old), tried(number=2, kernel="ab" * 32)],
            [
                today(),
                today("M8,N256", device=A100),
                today(problem=key("M64,N256", "fp16"), created_at=old),
                today("M16,N256", origin="imported", trusted=False),
                today("M32,N256", kernel="ab" * 32),
            ],
            [revocation()],
        )
        registry.merge([tried("M8,N256", number=9)], origin="imported")
        registry.count_misses([miss()])
    return path


def left(path: Path) -> tuple[int, int, int, int]:
    with Registry.open(path) as registry:
        found = registry.verdicts(), registry.trials(), registry.revocations(), registry.misses()
        assert registry.problems == []
    verdicts, trials, revocations, misses = map(len, found)
    return verdicts, trials, revocations, misses


REMOVALS = [
    (["--gpu", "a100"], (4, 4)),
    (["--gpu", "H20"], (1, 0)),
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


DAMAGE = {
    "UPDATE verdict SET notes = '[' WHERE id = 1": "1 damaged verdicts",
    "UPDATE trial SET reason = 'another'": "4 damaged trials",
    "UPDATE miss SET calls = 99": "1 damaged problems asked for",
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
    kept = [json.loads(line) for file in mine.parent.glob("*.damaged-*") for line in file.read_text().splitlines()]
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


def test_a_time_is_a_date_or_how_long_ago() -> None:
    said = lambda text: Moment().convert(text, None, None)  # noqa: E731
    assert said("2026-11-01") == datetime(2026, 11, 1, tzinfo=UTC)
    assert said("2026-11-01T12:00+02:00") == datetime(2026, 11, 1, 10, tzinfo=UTC)
    now = datetime.now(UTC)
    for text, ago in {
        "90m": timedelta(minutes=90),
        "2h": timedelta(hours=2),
        "3d": timedelta(3),
        "1w": timedelta(7),
    }.items():
        assert now - ago <= said(text) <= datetime.now(UTC) - ago
    for text in ("", "soon", "3", "3 years", "999999w", "2026-13-01"):
        with pytest.raises(click.BadParameter, match="is no time such as"):
            said(text)


SHOWN = [
    (["--dtype", "fp16"], 1),
    (["--gpu", "a100"], 1),
    (["--since", "2026-06-01"], 4),
    (["--since", "2025-01-01", "--dtype", "fp16"], 1),
    (["--since", "2026-11-21T12:00:00+00:00"], 4),
    (["--since", "2026-11-21T12:00:01"], 0),
    (["--measured"], 5),
]


@pytest.mark.parametrize(("given", "count"), SHOWN, ids=[" ".join(given) for given, _ in SHOWN])
def test_show_and_export_take_the_same_filters(
    run: Run, mine: Path, tmp_path: Path, given: list[str], count: int
) -> None:
    assert len(json.loads(run("show", "--format", "json", *given).stdout)) == count
    lines = run("export", "-", "--no-trials", *given).stdout.splitlines()
    assert sum('"type":"verdict"' in line for line in lines) == count
    assert sum('"type":"trial"' in line for line in lines) == 0
    assert sum('"type":"revocation"' in line for line in lines) == 1
    (tmp_path / "part.jsonl").write_text("\n".join(lines) + "\n")
    run("import", tmp_path / "part.jsonl", "--registry", tmp_path / "new.db")


def test_predictions_are_left_out_where_measurements_are_asked_for(run: Run, mine: Path) -> None:
    with Registry.open(mine, write=True) as registry:
        registry.record(verdict=predicted(problem=key("M1,N256"), kernel=OP.digest))
    assert len(json.loads(run("show", "--format", "json").stdout)) == 6
    assert len(json.loads(run("show", "--format", "json", "--measured").stdout)) == 5
    assert run("show", "--dtype", "fp32").stdout == "no verdict fits\n"


def test_trials_are_shown_and_exported_on_demand(run: Run, mine: Path) -> None:
    with Registry.open(mine, write=True) as registry:
        registry.record([broken_trial(problem=key("M64,N256"), kernel=OP.digest)])
    rows = json.loads(run("show", "--trials", "--format", "json").stdout)
    assert [each["status"] for each in rows].count("failed") == 1
    assert len(rows) == 5
    text = run("show", "--trials", "--gpu", "h200").stdout
    assert "rms_norm_fwd M64,N256 bf16 on NVIDIA H200" in text
    assert "compile_error: line 1 ü" in text
    assert "\x1b" not in text
    assert run("show", "--trials", "--gpu", "A10G").stdout == "no trial fits\n"
    assert sum('"type":"trial"' in line for line in run("export", "-", "--gpu", "H200").stdout.splitlines()) == 5


def test_an_export_of_everything_is_what_it_was(run: Run, mine: Path, tmp_path: Path) -> None:
    run("export", tmp_path / "all.jsonl")
    with Registry.open(mine) as registry, (tmp_path / "again.jsonl").open("w") as stream:
        export(registry, stream)
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()


def test_differences_of_every_kind_are_told(run: Run, tmp_path: Path) -> None:
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    other = {**today().config, "num_warps": 16}
    with Registry.open(a, write=True) as registry:
        registry.merge(verdicts=[today(f"M{rows},N256") for rows in (1, 2, 4, 8, 16)])
    with Registry.open(b, write=True) as registry:
        registry.merge(
            verdicts=[
                today("M2,N256"),
                today("M4,N256", config=other),
                today("M8,N256", time_ms=0.2),
                today("M16,N256", trusted=False),
                today("M32,N256"),
            ]
        )
    rows = json.loads(run("diff", a, b, "--format", "json").stdout)
    assert {each["problem"].split(",")[0]: each["kind"] for each in rows} == {
        "M1": "only in A",
        "M4": "other winner",
        "M8": "other time",
        "M16": "other evidence",
        "M32": "only in B",
    }
    slower = next(each for each in rows if each["kind"] == "other time")
    assert (slower["ratio"], slower["a"]["time_ms"], slower["b"]["time_ms"]) == (2.0, 0.1, 0.2)
    text = run("diff", a, b).stdout
    assert "B takes 2.000 times as long" in text
    assert text.endswith("1 only in A, 1 only in B, 1 other winner, 1 other time, 1 other evidence\n")
    assert run("diff", a, a).stdout.endswith("no verdict differs\n")
    run("diff", a, b, "--exit-code", status=1)
    run("diff", a, a, "--exit-code")
    run("diff", a, b, "--exit-code", "--gpu", "A100")
    run("export", tmp_path / "a.jsonl", "--registry", a)
    assert run("diff", a, tmp_path / "a.jsonl", "--exit-code", status=1).stdout.count("other evidence") == 6, (
        "untrusted"
    )
    assert "there is no registry" in run("diff", a, tmp_path / "none.db", status=1).stderr
    assert "there is no registry" in run("diff", a, "user", status=1).stderr


def test_registries_and_exports_are_merged_into_a_new_one(run: Run, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "claim.jsonl").write_text(
        signed(
            {"type": "verdict", **today("M512,N256").portable()},
            {"type": "verdict", **today("M64,N256", op="no_such_op").portable()},
        )
    )
    into = tmp_path / "all.db"
    said = run("merge", "user", tmp_path / "claim.jsonl", "-o", into).stderr
    assert "claim.jsonl: line 3: unknown op no_such_op" in said
    assert "6 verdicts, 4 trials and 1 revocations" in said
    with Registry.open(mine) as one, Registry.open(into) as both:
        assert {each.sha256 for each in one.verdicts()} < {each.sha256 for each in both.verdicts()}
        assert one.revocations() == both.revocations()
        assert len(both.trials(origin="local")) == len(one.trials(origin="local")) == 3
        assert [each.trusted for each in both.verdicts() if each.problem == key("M512,N256")] == [False]
    before = into.read_bytes()
    assert "is there already" in run("merge", "user", "-o", into, status=1).stderr
    assert "is there already" in run("merge", "user", "-o", tmp_path, status=1).stderr
    assert (
        "there is no registry" in run("merge", "user", tmp_path / "gone.db", "-o", tmp_path / "c.db", status=1).stderr
    )
    assert into.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["all.db", "claim.jsonl", "data"]


def _contents(path: Path) -> tuple[Any, ...]:
    with FileReader.open(path) as reading:
        local, others = reading.trials(origin="local"), reading.trials(origin="imported")
        found = reading.verdicts(), reading.revocations()
    return *found, *(sorted(each.sha256 for each in some) for some in (local, others))


RECORDS = st.lists(
    st.builds(
        lambda rows, trusted, width, imported, time_ms: replace(
            verdict(problem=problem(rows), time_ms=time_ms),
            trusted=trusted,
            interval=Speedup(1.2, 1.2 - width, 1.2 + width),
            origin="imported" if imported else "local",
        ),
        st.sampled_from([1, 2]),
        st.booleans(),
        st.sampled_from([0.01, 0.02]),
        st.booleans(),
        st.sampled_from([0.1, 0.2]),
    ),
    max_size=4,
)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(RECORDS, st.lists(st.integers(0, 3), max_size=3), st.booleans()), min_size=2, max_size=3))
def test_a_merge_does_not_depend_on_order(tmp_path_factory: pytest.TempPathFactory, parts: Any) -> None:
    folder = tmp_path_factory.mktemp("merge")
    names = []
    for number, (verdicts, trials, imported) in enumerate(parts):
        names.append(str(folder / f"{number}.db"))
        with Registry.open(names[-1], write=True) as registry:
            registry.merge(verdicts=verdicts)
            registry.merge(map(trial, trials), origin="imported" if imported else "local")
            registry.merge(revocations=[revocation(trusted=imported)])
    made = []
    for place, order in enumerate(itertools.permutations(names)):
        merge(order, folder / f"to{place}.db", allowed={}, is_problem=lambda op, key: True)
        made.append(_contents(folder / f"to{place}.db"))
    assert all(each == made[0] for each in made)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_the_help_of_every_command_ends_with_an_example_that_it_takes(name: str) -> None:
    command = main.commands[name]
    text = CliRunner().invoke(main, [name, "--help"]).output.rstrip()
    last = text.splitlines()[-1]
    assert last.startswith(f"    tilebook {name}") or last.startswith(f"  tilebook {name}"), last
    _, _, examples = text.partition("Example")
    for line in [each for each in examples.splitlines() if each.strip().startswith("tilebook")]:
        words = list(itertools.takewhile(lambda word: word not in ("|", "<", ">"), shlex.split(line)))
        arguments = ["/dev/null" if each.endswith(".jsonl") and name == "import" else each for each in words[2:]]
        assert isinstance(command.make_context(name, arguments), click.Context), line
