from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from registry_samples import miss, predicted, problem, revocation, trial, verdict

from tilebook.registry import DenyList, Layers, Registry, RegistryError
from tilebook.registry import layers as layers_module


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TILEBOOK_REGISTRY", raising=False)
    monkeypatch.setattr(layers_module, "SHIPPED", tmp_path / "package" / "registry.db")
    return tmp_path


def _put(target: str | Path, *verdicts: object) -> None:
    with Registry.open(target, write=True) as registry:
        registry.merge(verdicts=verdicts)  # type: ignore[arg-type]


def test_the_order_is_explicit_user_shipped(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, _ in Layers.default().layers] == ["user", "shipped"]
    monkeypatch.setenv("TILEBOOK_REGISTRY", "/from/environment.db")
    assert Layers.default().layers[0] == ("explicit", "/from/environment.db")
    assert Layers.default("/argument.db").layers[0] == ("explicit", "/argument.db")


def test_a_fresh_machine_has_no_verdicts_and_no_problems(home: Path) -> None:
    layers = Layers.default()
    assert (layers.verdicts(), layers.problems) == ([], [])
    assert not (home / "data").exists()


def test_the_first_layer_wins_for_each_key(home: Path) -> None:
    explicit = home / "explicit.db"
    layers = Layers.default(explicit)
    user, shipped = layers.layers[1][1], layers.layers[2][1]
    _put(explicit, verdict(config={"BLOCK_M": 1}))
    _put(user, verdict(config={"BLOCK_M": 2}), verdict(kernel="aa" * 8))
    _put(shipped, verdict(config={"BLOCK_M": 3}), verdict(problem=problem(9)))
    found = {(v.problem, v.kernel): (name, v.config) for name, v in layers.verdicts()}
    assert len(found) == 3
    assert found[problem(), verdict().kernel] == ("explicit", {"BLOCK_M": 1})
    assert found[problem(), "aa" * 8][0] == "user"
    assert found[problem(9), verdict().kernel][0] == "shipped"
    assert [name for name, _ in layers.verdicts(problem=problem(9))] == ["shipped"]


@pytest.mark.parametrize("first", [predicted(), verdict(trusted=False, origin="imported")])
def test_a_lesser_verdict_does_not_hide_a_trusted_measurement(home: Path, first: object) -> None:
    layers = Layers.default()
    _put(layers.layers[0][1], first)
    _put(layers.layers[1][1], verdict())
    assert layers.verdicts() == [("shipped", verdict())]


def test_a_broken_layer_is_a_problem_of_one_line_and_the_others_serve(home: Path) -> None:
    layers = Layers.default(home / "missing.db")
    user, shipped = Path(layers.layers[1][1]), layers.layers[2][1]
    user.parent.mkdir(parents=True)
    user.write_text("not a registry, but longer than the header of one" * 4)
    _put(shipped, verdict())
    for _ in range(2):
        assert layers.verdicts() == [("shipped", verdict())]
        assert len(layers.problems) == 2
    assert "no registry" in layers.problems[0]
    assert "foreign" in layers.problems[1]


def test_revocations_of_all_layers_add_up(home: Path) -> None:
    layers = Layers.default(home / "explicit.db")
    user, shipped = layers.layers[1][1], layers.layers[2][1]
    theirs = revocation(origin="imported", trusted=False, reason="theirs")
    for target, each in ((home / "explicit.db", theirs), (user, revocation(config={})), (shipped, revocation())):
        with Registry.open(target, write=True) as registry:
            registry.revoke(each)
    assert sorted(layers.revocations(), key=str) == [("shipped", revocation()), ("user", revocation(config={}))]
    _, together = layers.read(op="another_op")
    assert together == layers.revocations()


def test_a_damaged_revocation_is_a_problem_of_its_layer(home: Path) -> None:
    layers = Layers.default()
    _put(layers.layers[0][1], verdict())
    with Registry.open(layers.layers[0][1], write=True) as registry:
        registry.revoke(revocation())
    with sqlite3.connect(layers.layers[0][1]) as database:
        database.execute("UPDATE revocation SET config = '{}'")
    assert layers.read() == ([("user", verdict())], [])
    assert "may run again" in layers.problems[0]


@pytest.mark.parametrize(
    ("changes", "denied"),
    [
        ({}, True),
        ({"config": {"BLOCK_M": 128, "num_warps": 8}}, True),
        ({"config": {}}, True),
        ({"config": {"BLOCK_M": 128}}, True),
        ({"config": {"BLOCK_M": 128, "num_stages": 2}}, False),
        ({"config": {"BLOCK_M": 64}}, False),
        ({"kernel": None}, True),
        ({"kernel": "ff" * 8}, False),
        ({"arch": None}, True),
        ({"arch": "sm_80"}, False),
        ({"triton": None}, True),
        ({"triton": "<3.6"}, False),
        ({"implementation": "cudnn"}, False),
        ({"op": "rms_norm_bwd"}, False),
        ({"trusted": False}, False),
    ],
    ids=str,
)
def test_a_revocation_covers_what_fits_all_that_it_names(changes: dict[str, Any], denied: bool) -> None:
    given = revocation(**{"config": {"BLOCK_M": 128}, **changes})
    assert (DenyList([given], "3.6.0").winner(verdict()) is not None) is denied


def test_ledgers_of_all_layers_add_up_heaviest_first(home: Path) -> None:
    device = miss().device
    for target, counted in (
        (home / "mine.db", [miss(1, calls=5), miss(2, calls=7)]),
        (Layers.default().layers[0][1], [miss(1, calls=4), miss(3, calls=1)]),
    ):
        with Registry.open(target, write=True) as registry:
            registry.count_misses(counted)
    found = Layers.default(home / "mine.db").misses(device)
    assert [(each.problem, each.calls) for each in found] == [(problem(1), 9), (problem(2), 7), (problem(3), 1)]


def test_the_writer_is_the_explicit_layer_or_none(home: Path) -> None:
    bad = home / "bad.db"
    bad.write_text("x" * 200)
    with pytest.raises(RegistryError, match="foreign"):
        Layers.default(bad).writer()
    with Layers.default(home / "good.db").writer() as registry:
        assert registry.label == str(home / "good.db")


def test_the_writer_is_the_user_layer_by_default_and_never_the_shipped_one(home: Path) -> None:
    layers = Layers.default()
    with layers.writer() as registry:
        registry.record([trial()], verdict())
        assert registry.target == layers.layers[0][1]
    Path(layers.layers[0][1]).write_text("x" * 200)
    with pytest.raises(RegistryError, match="no registry can be written"):
        layers.writer()
    assert not (home / "package").exists()
