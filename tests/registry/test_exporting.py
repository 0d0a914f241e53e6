"""An export that would have nothing in it is an error, and leaves what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_samples import Run, today

from tilebook.registry import Registry


@pytest.fixture
def shipped(run: Run, tmp_path: Path) -> Path:
    """What ships: two verdicts, and no registry of the user's."""
    place = tmp_path / "package" / "registry.db"
    with Registry.open(place, write=True) as registry:
        registry.merge(verdicts=[today("M1,N256", origin="shipped"), today("M2,N256", origin="shipped")])
    return place


@pytest.fixture
def signer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    run("keys", "make")


@pytest.mark.usefixtures("shipped", "signer")
def test_what_was_imported_without_trust_is_not_signed_and_the_file_that_is_there_stays(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "file.jsonl"
    assert "2 records written" in run("export", file).stderr
    before = file.read_bytes()
    run("import", file)
    said = run("export", file, "--sign", "mine", status=1)
    assert said.stderr.startswith("tilebook: no record of your own registry")
    assert "is trusted here" in said.stderr
    assert said.stderr.count("\n") == 1
    assert file.read_bytes() == before
    assert [each.name for each in tmp_path.glob(".file*")] == []
    assert run("export", "-", "--sign", "mine", status=1).stdout == ""


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize(
    "given", [["--gpu", "A100"], ["--op", "add_fwd"], ["--dtype", "fp32"], ["--since", "2030-01-01"]], ids=" ".join
)
def test_filters_that_nothing_fits_leave_the_file_that_is_there(run: Run, tmp_path: Path, given: list[str]) -> None:
    file = tmp_path / "file.jsonl"
    run("export", file)
    before = file.read_bytes()
    assert run("export", file, *given, status=1).stderr == "tilebook: no record fits: nothing was written\n"
    assert file.read_bytes() == before
    assert run("export", tmp_path / "new.jsonl", *given, status=1).stdout == ""
    assert not (tmp_path / "new.jsonl").exists()
    assert run("export", "-", *given, status=1).stdout == ""


def test_an_export_of_one_s_own_records_says_that_what_ships_is_not_in_it(
    run: Run, shipped: Path, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "data" / "tilebook" / "registry.db", write=True) as registry:
        registry.merge(verdicts=[today("M4,N256")])
    said = run("export", tmp_path / "file.jsonl").stderr
    assert said.startswith("1 records written to ")
    assert "; of your own registry alone, without what ships with tilebook" in said
    assert "of your own registry" in run("export", "-", "--gpu", "A100", status=1).stderr
    assert "of your own" not in run("export", "-", "--registry", shipped).stderr


@pytest.mark.usefixtures("shipped")
def test_without_trials_no_studies_are_made_and_it_is_said_that_what_ships_has_none(run: Run, tmp_path: Path) -> None:
    said = run("export", tmp_path / "studies.db", "--as", "optuna", status=1).stderr
    assert said == "tilebook: no trial fits: tunes keep trials, and what ships with tilebook has none\n"
    assert not (tmp_path / "studies.db").exists()


@pytest.mark.usefixtures("shipped")
def test_without_verdicts_on_kernels_of_others_no_folder_is_made(run: Run, tmp_path: Path) -> None:
    said = run("export", tmp_path / "configs", "--as", "fla", status=1).stderr
    assert said == "tilebook: no measured verdict on a kernel of others fits: nothing was written\n"
    assert not (tmp_path / "configs").exists()


def test_a_folder_that_is_a_file_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "junk.txt").write_text("junk")
    monkeypatch.setattr("tilebook.foreign.fla.files", lambda verdicts: ({"a.json": {}}, []))
    said = run("export", tmp_path / "junk.txt", "--as", "fla", status=1).stderr
    assert said == f"tilebook: {tmp_path / 'junk.txt'} cannot be written: File exists\n"
