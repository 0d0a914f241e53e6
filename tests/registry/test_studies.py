"""Trials as Optuna's studies: what Optuna and its dashboard read of them."""

import io
import json
import os
import resource
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import optuna
import pytest
from command_samples import tried
from registry_samples import A100, broken_trial, trial

from tilebook.registry import Environment, Failure, Registry, Status
from tilebook.report.studies import write


@pytest.fixture
def studies(run, tmp_path):
    """A file with the studies of a few trials."""
    slow = tried(
        number=3, config={"BLOCK_M": 32, "num_warps": 8}, status=Status.REJECTED, failure=Failure.SLOW, reason="twice"
    )
    found = [tried(number=n, config={"BLOCK_M": 64 << n, "num_warps": 4}) for n in range(3)]
    versions = Environment({"triton": "3.6.0", "tilebook": "0.9"})
    found[0] = replace(found[0], environment=versions)
    with Registry.open(tmp_path / "mine.db", write=True) as registry:
        registry.merge([*found, slow, broken_trial(op="mlp_up_fwd"), trial(9, device=A100)])
    run("export", tmp_path / "studies.db", "--as", "optuna", "--registry", tmp_path / "mine.db")
    return tmp_path / "studies.db"


def names(file):
    return optuna.get_all_study_names(f"sqlite:///{file}")


def test_optuna_loads_what_was_tried(studies):
    (name,) = [each for each in names(studies) if "H200" in each and "rms" in each]
    assert name == "rms_norm_fwd M64,N256 bf16 on NVIDIA H200: triton"
    assert len(names(studies)) == 3
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{studies}")
    assert (study.best_value, study.best_params) == (0.1, {"BLOCK_M": 64, "num_warps": 4})
    states = {each.user_attrs.get("reason"): each.state for each in study.trials}
    assert states == {None: optuna.trial.TrialState.COMPLETE, "twice": optuna.trial.TrialState.PRUNED}
    block = study.trials[0].distributions["BLOCK_M"]
    assert (block.low, block.high) == (32, 256)
    told = study.best_trial.user_attrs
    assert (told["triton"], told["tilebook"]) == ("3.6.0", "0.9")
    study.add_trial(study.best_trial)


def test_more_is_added_to_what_is_there(studies, run, tmp_path):
    mine = tmp_path / "mine.db"
    assert run("export", studies, "--as", "optuna", "--registry", mine).output.startswith("0 new trials in 3 studies")
    with Registry.open(mine, write=True) as registry:
        registry.record([tried(number=20, config={"BLOCK_M": 4096, "num_warps": 4, "use_tma": False})])
    only = ("--op", "rms_norm_fwd", "--gpu", "h200")
    assert run("export", studies, "--as", "optuna", *only, "--registry", mine).output.startswith("1 new trial in 1 stu")
    with Registry.open(mine, write=True) as registry:
        registry.record([trial(21, op="mlp_up_fwd", config={"order": "column-major"})])
    told = run("export", studies, "--as", "optuna", "--registry", mine, status=2).output
    assert "name another file" in told


def test_the_name_of_a_file_is_no_url(studies, run, tmp_path):
    mine, odd = tmp_path / "mine.db", tmp_path / "mine.db?timeout=3 %41#"
    before = mine.read_bytes()
    for new in (6, 0):
        assert run("export", odd, "--as", "optuna", "--registry", mine).output.startswith(f"{new} new trials")
    assert mine.read_bytes() == before
    assert "no stdout" in run("export", "-", "--as", "optuna", status=2).output
    os.mkfifo(tmp_path / "pipe")
    assert "is left as it is" in run("export", tmp_path / "pipe", "--as", "optuna", status=2).output


def test_two_at_once_add_a_trial_once(studies, tmp_path):
    file = tmp_path / "both.db"
    with Registry.open(tmp_path / "mine.db") as registry, ThreadPoolExecutor() as pool:
        trials = registry.trials()
        assert sorted(new for _, new in pool.map(lambda _: write(file, trials), range(2))) == [0, len(trials)]


def test_studies_that_cannot_be_written_are_one_line(studies, run, tmp_path):
    with closing(sqlite3.connect(studies)) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        database.commit()
    told = run("export", studies, "--as", "optuna", "--registry", tmp_path / "mine.db", status=2).output
    assert "cannot be written" in told
    assert len(told.splitlines()) == 1


def test_studies_that_find_no_room_leave_nothing_in_the_way(studies, run, tmp_path):
    file, command = tmp_path / "full.db", ("--as", "optuna", "--registry", tmp_path / "mine.db")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a disk that is full
    try:
        told = run("export", file, *command, status=2).output
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in told
    assert "sqlalche.me" not in told
    assert not file.exists()
    run("export", file, *command)


@pytest.mark.parametrize("content", [None, b"hello", b"", "CREATE TABLE study_directions (id)"])
def test_what_is_no_storage_is_left_as_it_is(content, run, tmp_path):
    file = tmp_path / "other.db"
    if content is None:
        with Registry.open(file, write=True):
            pass
    elif isinstance(content, str):
        with closing(sqlite3.connect(file)) as database:
            database.execute(content)
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    assert "is left as it is" in run("export", file, "--as", "optuna", status=2).output
    assert file.read_bytes() == before


def test_the_dashboard_shows_the_studies(studies):
    dashboard = pytest.importorskip("optuna_dashboard")
    app, found = dashboard.wsgi(f"sqlite:///{studies}"), []
    request = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "wsgi.input": io.BytesIO(), "QUERY_STRING": ""}
    body = b"".join(app({**request, "SERVER_NAME": "", "SERVER_PORT": "80"}, lambda *head: found.append(head)))
    assert found[0][0].startswith("200")
    assert {each["study_name"] for each in json.loads(body)["study_summaries"]} == set(names(studies))
