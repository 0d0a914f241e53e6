"""What is shown and exported of registries, in what they differ, and how they are brought together."""

from __future__ import annotations

import importlib
import itertools
import json
import shlex
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from command_samples import OP, Run, key, today
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_samples import broken_trial, miss, predicted, problem, revocation, signed, trial, verdict

import tilebook.cli
from tilebook.cli import main
from tilebook.cli.common import COMMANDS, Moment
from tilebook.registry import Registry, Speedup, export
from tilebook.registry.filereader import FileReader
from tilebook.registry.gathering import merge


def test_a_strangers_numbers_that_have_no_end_are_json_all_the_same(run: Run, tmp_path: Path) -> None:
    with Registry.open(tmp_path / "mine.db", write=True) as registry:
        registry.merge(verdicts=[today(time_ms=5e-324)])
        registry.count_misses([miss(rows, 2**62, 1e308, problem=key(f"M{rows},N256")) for rows in (8, 16)])
    with Registry.open(tmp_path / "theirs.db", write=True) as registry:
        registry.merge(verdicts=[today(time_ms=1e308)])
    run("export", tmp_path / "theirs.jsonl", "--registry", tmp_path / "theirs.db")
    told = run("diff", tmp_path / "mine.db", tmp_path / "theirs.jsonl", "--format", "json").stdout
    assert [each["ratio"] for each in json.loads(told, parse_constant=pytest.fail)] == [None]
    status = ("status", "--gpu", "H200", "--registry", tmp_path / "mine.db")
    asked = json.loads(run(*status, "--format", "json").stdout, parse_constant=pytest.fail)
    assert (asked["asked_s"], [each["share"] for each in asked["asked"]]) == (None, [0.0, 0.0])
    assert "nan" not in run(*status).stdout


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
        "M16": "other trust",
        "M32": "only in B",
    }
    slower = next(each for each in rows if each["kind"] == "other time")
    assert (slower["ratio"], slower["a"]["time_ms"], slower["b"]["time_ms"]) == (2.0, 0.1, 0.2)
    text = run("diff", a, b).stdout
    assert "B takes 2.000 times as long" in text
    assert text.endswith("1 only in A, 1 only in B, 1 other winner, 1 other time, 1 other trust\n")
    assert run("diff", a, a).stdout.endswith("no verdict differs\n")
    run("diff", a, b, "--exit-code", status=1)
    run("diff", a, a, "--exit-code")
    run("diff", a, b, "--exit-code", "--gpu", "A100")
    run("export", tmp_path / "a.jsonl", "--registry", a)
    assert "there is no registry" in run("diff", a, tmp_path / "none.db", status=1).stderr
    assert "there is no registry" in run("diff", a, "user", status=1).stderr


def test_of_verdicts_that_one_side_does_not_trust_a_line_tells_each_op_and_no_time(run: Run, tmp_path: Path) -> None:
    a = tmp_path / "a.db"
    with Registry.open(a, write=True) as registry:
        registry.merge(verdicts=[today(f"M{rows},N256") for rows in (1, 2, 4, 8, 16)])
    run("export", tmp_path / "a.jsonl", "--registry", a)
    text = run("diff", a, tmp_path / "a.jsonl", "--exit-code", status=1).stdout
    assert text.splitlines()[2:] == [
        f"other trust: {OP.name} on NVIDIA H200: 5 verdicts that only A trusts, with the same winners and times",
        "5 other trust",
    ]
    told = json.loads(run("diff", tmp_path / "a.jsonl", a, "--format", "json").stdout)
    assert [(each["kind"], each["a"]["trusted"], each["ratio"]) for each in told] == [("other trust", False, 1.0)] * 5


def test_other_evidence_of_the_same_time_has_no_ratio(run: Run, tmp_path: Path) -> None:
    for name, tried in (("a", 7), ("b", 8)):
        with Registry.open(tmp_path / f"{name}.db", write=True) as registry:
            registry.merge(verdicts=[today(notes={"tried": tried})])
    told = run("diff", tmp_path / "a.db", tmp_path / "b.db").stdout
    assert "other evidence: " in told
    assert "times as long" not in told


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


def test_every_command_is_in_the_module_that_it_is_looked_for_in() -> None:
    for module in (Path(tilebook.cli.__file__).parent).glob("*.py"):
        importlib.import_module(f"tilebook.cli.{module.stem}")
    homes = {(command.callback.__module__.rpartition(".")[2], name) for name, command in main.commands.items()}
    assert homes == {(module, name) for module, names in COMMANDS.items() for name in names}


@pytest.mark.parametrize("name", [name for names in COMMANDS.values() for name in names])
def test_the_help_of_every_command_ends_with_an_example_that_it_takes(name: str) -> None:
    command = main.get_command(click.Context(main), name)
    text = CliRunner().invoke(main, [name, "--help"]).output.rstrip()
    last = text.splitlines()[-1]
    assert last.startswith(f"    tilebook {name}") or last.startswith(f"  tilebook {name}"), last
    _, _, examples = text.partition("Example")
    for line in [each for each in examples.splitlines() if each.strip().startswith("tilebook")]:
        words = list(itertools.takewhile(lambda word: word not in ("|", "<", ">"), shlex.split(line)))
        given = {"import": ".jsonl", "record": ".json"}.get(name, "\0")
        arguments = ["/dev/null" if each.endswith(given) else each for each in words[2:]]
        assert isinstance(command.make_context(name, arguments), click.Context), line
