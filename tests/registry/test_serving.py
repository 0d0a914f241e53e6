"""What dispatch reads of the registries is what they hold, at once, and whatever state they are in."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry_samples import A100, H200, KERNEL, predicted, problem, revocation, trial, verdict

import tilebook.registry
from tilebook.registry import Layers, Registry, Verdict, serving
from tilebook.registry import layers as layers_module

REPOSITORY = Path(tilebook.registry.__file__).parents[2]
OP = "rms_norm_fwd"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the layers are; the explicit one is `mine.db`."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TILEBOOK_REGISTRY", str(tmp_path / "mine.db"))
    monkeypatch.setattr(layers_module, "SHIPPED", tmp_path / "package" / "registry.db")
    return tmp_path


def put(target: str | Path, *verdicts: Verdict, revocations: Any = ()) -> None:
    with Registry.open(target, write=True) as registry:
        registry.merge([trial()], verdicts, revocations)


def read(explicit: str | None = None) -> serving.Table:
    return serving.read(H200.name, H200.arch, H200.sm_count, explicit)


def test_what_is_read_is_what_the_layers_hold_for_this_gpu(home: Path) -> None:
    explicit, user, shipped = (target for _, target in Layers.default().layers)
    put(
        explicit, verdict(), verdict(device=A100), verdict(op="mlp_fwd", kernel="ab" * 8), predicted(problem=problem(2))
    )
    put(user, verdict(config={}), verdict(kernel="cd" * 8), verdict(problem=problem(2)))
    put(shipped, verdict(problem=problem(3), origin="shipped"), verdict(problem=problem(2), config={}))
    table = read()
    found = {(each.problem, each.kernel): each for each in table.verdicts(OP)}
    expected = {
        (each.problem, each.kernel): (layer, each) for layer, each in Layers.default().verdicts(op=OP, device=H200)
    }
    assert table.problems == []
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for key, (layer, whole) in expected.items():
        got = found[key]
        assert (got.layer, got.origin, got.trusted) == (layer, whole.origin, whole.trusted)
        assert (got.op, got.status, got.measured) == (OP, whole.status, whole.measured)
        assert got.environment == whole.environment.versions
        assert (got.speedup, got.speedup_low, got.speedup_high) == (
            whole.speedup,
            whole.speedup_low,
            whole.speedup_high,
        )
        assert [(each.implementation, each.config) for each in got.finalists] == whole.ranking()
        assert [each.time_ms for each in got.finalists] == [each.time_ms for each in whole.finalists]
        assert [each.code for each in got.finalists] == [each.code for each in whole.finalists]
        assert (got.sources, got.mode) == (whole.sources, whole.mode)
    assert [each.kernel for each in table.verdicts("mlp_fwd")] == ["ab" * 8]
    assert table.verdicts("unheard_of") == []


@pytest.mark.parametrize("explicit", ["x://y", "sqlite://", "~nobody-is-called-so/x.db"])
def test_what_is_no_address_of_a_registry_hides_no_layer(home: Path, explicit: str) -> None:
    put(home / "package" / "registry.db", verdict(origin="shipped"))
    table = read(explicit)
    assert [each.layer for each in table.verdicts(OP)] == ["shipped"]
    assert len(table.problems) == 1


def test_sources_are_those_of_the_time_of_measuring(home: Path) -> None:
    put(home / "mine.db", verdict(sources={"second": "ef" * 32}, mode="eager"))
    (found,) = read().verdicts(OP)
    assert (found.source_of("second"), found.source_of("triton"), found.mode) == ("ef" * 32, KERNEL, "eager")


def test_what_is_not_trusted_is_marked_and_hides_nothing(home: Path) -> None:
    put(home / "mine.db", verdict(trusted=False), verdict(trusted=False, problem=problem(2)))
    put(home / "data" / "tilebook" / "registry.db", predicted())
    assert {(each.problem, each.trusted, each.status) for each in read().verdicts(OP)} == {
        (problem(), True, "predicted"),
        (problem(2), False, "measured"),
    }


def test_revocations_of_all_layers_are_there_at_once(home: Path) -> None:
    put(home / "mine.db", revocations=[revocation()])
    put(home / "package" / "registry.db", revocations=[revocation(), revocation(arch="sm_80", op="mlp_fwd")])
    assert read().revocations == [revocation(), revocation(arch="sm_80", op="mlp_fwd")]


@pytest.mark.parametrize(
    "damage",
    ["UPDATE verdict SET trusted = 2", "UPDATE environment SET versions = '[['", "UPDATE device SET sm_count = 131"],
)
def test_a_damaged_row_is_passed_over_and_named(home: Path, damage: str) -> None:
    put(home / "mine.db", verdict(trusted=False), verdict(problem=problem(2), trusted=False))
    with sqlite3.connect(home / "mine.db") as database:
        database.execute(damage)
    table = serving.read(H200.name, H200.arch, 131 if "device" in damage else 132)
    assert table.verdicts(OP) == []
    assert table.problems == [f"registry {home / 'mine.db'}: left out 2 damaged rows"]


def test_a_damaged_revocation_is_a_problem_that_names_it(home: Path) -> None:
    put(home / "mine.db", revocations=[revocation()])
    with sqlite3.connect(home / "mine.db") as database:
        database.execute("UPDATE revocation SET config = '{}'")
    table = read()
    assert table.revocations == []
    assert f"--undo '{revocation().scope[:8]}'" in table.problems[0]


def test_a_layer_that_cannot_be_read_is_a_problem_and_the_others_serve(home: Path) -> None:
    put(home / "package" / "registry.db", verdict())
    table = read()
    assert [each.layer for each in table.verdicts(OP)] == ["shipped"]
    assert table.problems == [f"there is no registry at {home / 'mine.db'}"]
    (home / "mine.db").write_text("notes, longer than the header of a registry" * 4)
    table = read()
    assert [each.layer for each in table.verdicts(OP)] == ["shipped"]
    assert "foreign" in table.problems[0]


def test_without_a_home_the_explicit_and_the_shipped_layer_serve(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home / "mine.db", verdict())
    put(home / "package" / "registry.db", verdict(problem=problem(2)))
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert [each.layer for each in read().verdicts(OP)] == ["explicit", "shipped"]


def test_a_locked_layer_is_asked_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "READER_WAIT_S", 0.0)
    put(home / "mine.db", verdict(), revocations=[revocation()])
    put(home / "package" / "registry.db", verdict(problem=problem(2)))
    writer = sqlite3.connect(home / "mine.db", isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    table = read()
    assert table.locked
    assert [each.layer for each in table.verdicts(OP)] == ["shipped"]
    assert table.revocations == []
    assert "locked" in table.problems[0]
    writer.execute("ROLLBACK")
    assert [each.layer for each in table.verdicts(OP)] == ["explicit", "shipped"]
    assert table.revocations == [revocation()]
    assert not table.locked


def test_verdicts_are_read_once_and_stay_as_they_were(home: Path) -> None:
    put(home / "mine.db", verdict())
    table = read()
    before = table.verdicts(OP)
    (home / "mine.db").unlink()
    assert table.verdicts(OP) == before


def test_reading_needs_the_standard_library_alone(home: Path) -> None:
    put(home / "mine.db", verdict())
    code = (
        "import sys; from tilebook.registry import serving;"
        f"assert serving.read('{H200.name}', '{H200.arch}', {H200.sm_count}).verdicts('{OP}')[0].layer == 'explicit';"
        "sys.exit(sorted({'sqlalchemy', 'platformdirs', 'alembic', 'torch', 'triton'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_a_layer_on_postgresql_is_read_too(home: Path, postgres_target: str) -> None:
    put(postgres_target, verdict(), verdict(device=A100), revocations=[revocation()])
    table = read(postgres_target)
    assert [(each.layer, each.problem) for each in table.verdicts(OP)] == [("explicit", problem())]
    assert (table.revocations, table.problems) == ([revocation()], [])
