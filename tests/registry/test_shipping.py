"""What ships is text, and a file that is built from it: by whoever comes first, whole, and only when there is need."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from registry_samples import A100, H200, evidenced, predicted, problem, revocation, verdict

import tilebook.registry
from tilebook.registry import Layers, Registry, RegistryError, Verdict, serving, ship, shipped, sources

REPOSITORY = Path(tilebook.registry.__file__).parents[2]
SPACE = {"axes": {"BLOCK_M": [64, 128]}, "digest": "ab", "feasible": ["0f", "3"]}
OTHER = verdict(device=A100, op="mlp_fwd", problem=problem(9))


def shipping(each: Verdict) -> Verdict:
    return Verdict(**{**vars(each), "origin": "shipped"})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a package has its registry, with two GPUs' verdicts and a revocation."""
    path = tmp_path / "package" / "registry.db"
    assert shipped.write(path, [evidenced(), OTHER, verdict(trusted=False, problem=problem(3))], [revocation()]) == 2
    return path


def readings(place: Path) -> list[tuple[object, ...]]:
    """What people see, and what dispatch sees, of what ships."""
    layers = Layers([("shipped", str(place))])
    found, revocations = layers.read()
    table = serving.Table([("shipped", str(place))], H200)
    return [
        (sorted(each.sha256 for _, each in found), [each for _, each in revocations], layers.problems),
        ([each.problem for each in table.verdicts("rms_norm_fwd")], table.revocations, table.problems),
    ]


def test_the_text_has_a_file_for_each_gpu_and_op_in_one_order(place: Path) -> None:
    text = shipped.text_of(place)
    assert sorted(str(each.relative_to(text)) for each in text.glob("**/*.jsonl")) == [
        "nvidia-a100-sxm4-80gb/mlp_fwd.jsonl",
        "nvidia-h200/rms_norm_fwd.jsonl",
        "revocations.jsonl",
    ]
    before = {each: each.read_bytes() for each in text.glob("**/*.jsonl")}
    shipped.write(place, [OTHER, evidenced()], [revocation()])
    assert {each: each.read_bytes() for each in text.glob("**/*.jsonl")} == before


def test_what_no_longer_ships_leaves_no_text(place: Path) -> None:
    shipped.write(place, [OTHER], [])
    assert [each.name for each in shipped.text_of(place).glob("**/*.jsonl")] == ["mlp_fwd.jsonl"]


def test_the_text_is_in_the_export_format(place: Path) -> None:
    with Registry.open(place.with_name("mine.db"), write=True) as registry:
        with (shipped.text_of(place) / "nvidia-h200" / "rms_norm_fwd.jsonl").open() as stream:
            report = tilebook.registry.load(registry, stream, allowed=None, trust=True)
        assert (report.verdicts, report.skipped) == (1, [])
        assert registry.verdicts() == [Verdict(**{**vars(evidenced()), "origin": "imported", "notes": BRIEF})]


BRIEF = {**evidenced().notes, "spaces": {"triton": {"points": 4}}}


def test_the_points_of_the_searched_spaces_stay_behind(place: Path) -> None:
    shipped.write(place, [verdict(notes={"spaces": {"triton": SPACE}, "space": SPACE})], [])
    with Registry.open(place) as registry:
        (found,) = registry.verdicts()
    assert found.notes["spaces"] == {"triton": {"axes": {"BLOCK_M": [64, 128]}, "digest": "ab", "points": 6}}
    assert found.notes["space"] == found.notes["spaces"]["triton"]  # type: ignore[index, call-overload]


def test_the_file_is_a_registry_like_any(place: Path, tmp_path: Path) -> None:
    def tables(path: Path) -> dict[str, str]:
        with sqlite3.connect(path) as database:
            rows = database.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        return {name: " ".join(sql.split()) for name, sql in rows}

    Registry.open(tmp_path / "migrated.db", write=True).close()
    assert tables(place) == tables(tmp_path / "migrated.db")
    with Registry.open(place) as registry:
        assert registry.verdicts(op="mlp_fwd") == [shipping(OTHER)]
        assert [each.trusted for each in registry.verdicts()] == [True, True]
        assert registry.revocations() == [revocation(origin="shipped")]
        assert (registry.trials(), registry.problems) == ([], [])
    with Registry.open(place, write=True) as registry:
        registry.record(verdict=predicted(problem=problem(5)))
        assert len(registry.verdicts()) == 3


def test_a_checkout_builds_the_file_once_and_again_when_its_text_changes(place: Path) -> None:
    expected = readings(place)
    place.unlink()
    assert readings(place) == expected
    built = place.stat().st_ino
    assert readings(place) == expected
    assert place.stat().st_ino == built
    for each in shipped.text_of(place).glob("*a100*/*"):
        each.unlink()
    assert len(readings(place)[0][0]) == 1  # type: ignore[arg-type]
    assert place.stat().st_ino != built


@pytest.mark.parametrize("there", [False, True])
def test_what_ships_is_compared_and_merged_as_its_text_has_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(sources, "SHIPPED", place)
    assert len(sources.verdicts("shipped")[0]) == 2
    for each in shipped.text_of(place).glob("*a100*/*"):
        each.unlink()
    (file,) = shipped.text_of(place).glob("*h200*/*.jsonl")
    os.utime(file, ns=(1, 2**60))
    if not there:
        place.unlink()
    assert len(sources.verdicts("shipped")[0]) == 1


def test_what_cannot_be_built_is_read_from_its_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = readings(place)
    place.unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(shipped, "build", refuse)
    assert readings(place) == expected
    assert not place.exists()


def test_a_file_of_the_text_that_is_damaged_is_named_and_the_others_serve(place: Path) -> None:
    file = shipped.text_of(place) / "nvidia-a100-sxm4-80gb" / "mlp_fwd.jsonl"
    file.write_text(file.read_text().replace("0.1", "0.2"))
    for found, _, problems in readings(place):
        assert len(found) == 1  # type: ignore[arg-type]
        assert not problems or "mlp_fwd.jsonl: line" in problems[0]  # type: ignore[index]
    layers = Layers([("shipped", str(place))])
    layers.read()
    assert len(layers.problems) == 1


def _read_at_once(place: Path, barrier: object, answers: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    answers.put(len(serving.Table([("shipped", str(place))], H200).verdicts("rms_norm_fwd")))  # type: ignore[attr-defined]


def test_many_processes_may_build_it_at_once(place: Path) -> None:
    place.unlink()
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(6), fork.Queue()
    workers = [fork.Process(target=_read_at_once, args=(place, barrier, answers)) for _ in range(6)]
    for worker in workers:
        worker.start()
    assert [answers.get(timeout=60) for _ in workers] == [1] * 6
    for worker in workers:
        worker.join(60)
    assert sorted(os.listdir(place.parent)) == ["registry.db", "shipped"]


def test_without_text_the_file_stands_alone(place: Path) -> None:
    expected = readings(place)
    shipped.text_of(place).rename(place.with_name("elsewhere"))
    assert readings(place) == expected


def test_a_registry_of_before_can_be_shipped(place: Path) -> None:
    with Registry.open(place.with_name("source.db"), write=True) as registry:
        registry.merge((), [evidenced(), predicted(problem=problem(7), trusted=False)], [revocation()])
        assert ship(registry, place) == 1
        place.write_bytes(b"somebody's notes, longer than the header of a registry" * 4)
        with pytest.raises(RegistryError, match="foreign"):
            ship(registry, place)


def test_building_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; from tilebook.registry import shipped;"
        "sys.exit(sorted({'sqlalchemy', 'platformdirs', 'alembic', 'torch', 'triton'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
