"""Who made a record, where, in which run: through a tune, an export, an import and what is shown."""

import functools
import json
import re
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from click.testing import CliRunner
from command_samples import today
from registry_samples import A100, H200, START, revocation, trial, verdict
from sqlalchemy import text

from tilebook import provenance
from tilebook.cli import main
from tilebook.registry import Registry, schema, serving
from tilebook.registry.backend import make_engine
from tilebook.registry.filereader import reader
from tilebook.registry.target import Target


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    folder = tmp_path / "tilebook"
    folder.mkdir()
    return folder / "config.toml"


def run(*arguments):
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_nobody_is_named_unless_the_settings_do(settings):
    found = provenance.made()
    assert found.keys() == {"machine", "run"}
    assert re.fullmatch("[0-9a-f]{16}", found["machine"])
    assert socket.gethostname() not in found["machine"]
    assert provenance.made() == found
    settings.write_text('name = "Ada"\nmachine = "node 17"\nother = 1\n')
    assert provenance.made() == {"by": "Ada", "machine": "node 17", "run": found["run"]}


@pytest.mark.parametrize("text", ["name = ", "name = 3", 'name = "a\\nb"', "\xff", "a=" + "[" * 20_000])
def test_settings_that_cannot_be_read_are_one_warning(settings, text):
    settings.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"config\.toml cannot be read"):
        assert provenance.made().keys() == {"machine", "run"}


def test_two_processes_are_two_runs_on_one_machine():
    code = "from tilebook import provenance; import json; print(json.dumps(provenance.made()))"
    first, second = (json.loads(subprocess.check_output([sys.executable, "-c", code])) for _ in range(2))
    assert first["machine"] == second["machine"]
    assert first["run"] != second["run"]


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes for a GPU that is not here")
def test_who_made_it_travels_with_every_record(settings, tmp_path):
    settings.write_text('name = "Ada"\nmachine = "node 17"\n')
    mine, theirs, file = tmp_path / "mine.db", tmp_path / "theirs.db", tmp_path / "all.jsonl"
    shape = ("--shape", "M64,H32,I64", "--workers", "1")
    run("tune", "mlp", *shape, "--direction", "fwd", "--gpu", "H200", "--trials", "2", "--registry", mine)
    run("revoke", "mlp_up_fwd", "--yes", "--reason", "a test", "--triton", "<3", "--registry", mine)
    settings.write_text('name = "Eve"\n')
    run("export", file, "--registry", mine)
    run("import", file, "--trust", "--registry", theirs)
    made = {"by": "Ada", "machine": "node 17", "run": provenance.made()["run"]}
    for command in (["show"], ["show", "--trials"], ["revoke", "--list"]):
        rows = json.loads(run(*command, "--format", "json", "--registry", theirs))
        found = [each["made"] for each in rows if each["layer"] == "explicit"]
        assert found
        assert all(each == made for each in found)
    assert "by Ada" in run("show", "--registry", theirs)
    assert "by Ada" in run("revoke", "--list", "--registry", theirs)
    with Registry.open(theirs, write=True) as registry:
        registry.record(verdict=today(notes={"made": made}))
    told = run("explain", "rms_norm_fwd", "--shape", "M64,N256", "--gpu", "H200", "--registry", theirs)
    assert re.search(rf"made     \S+ by Ada on machine node 17 in run {made['run']}\n", told)


def test_a_made_up_provenance_is_refused(tmp_path):
    for wrong in ("Ada", {"by": 3}, {"who": "Ada"}, {"by": "a\nb"}):
        with pytest.raises(ValueError, match=r"made|by"):
            verdict(notes={"made": wrong})
        with pytest.raises(ValueError, match=r"made|by"):
            revocation(made=wrong)


def test_a_revocation_of_nobody_is_as_it_was(tmp_path):
    assert "made" not in revocation().portable()
    assert revocation().scope == revocation(made={"by": "Ada"}).scope
    with Registry.open(tmp_path / "registry.db", write=True) as registry:
        registry.merge(revocations=[revocation(), revocation(made={"by": "Ada"}, op="mlp_up_fwd")])
        assert {each.op: each.made for each in registry.revocations()} == {
            "rms_norm_fwd": {},
            "mlp_up_fwd": {"by": "Ada"},
        }


def test_what_trials_of_strangers_say_is_shown_as_it_stands(tmp_path):
    with Registry.open(tmp_path / "registry.db", write=True) as registry:
        registry.record([trial(facts={"made": ["no", "mapping"]}, device=A100)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("show", "--trials", "--gpu", "A100", "--registry", tmp_path / "registry.db")


def test_revocations_of_the_schema_before_are_read_and_kept(target):
    old = revocation(created_at=START)
    with Registry.open(target, write=True) as registry:
        registry.revoke(old)
    parsed = Target.parse(target)
    with make_engine(parsed, write=True).begin() as connection:
        connection.execute(text("ALTER TABLE revocation DROP COLUMN made"))
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0004'"))
        if parsed.path is not None:
            connection.exec_driver_sql("PRAGMA user_version=4")
    writer = functools.partial(Registry.open, write=True)
    for opened in (Registry.open, reader, writer, reader):
        with opened(target) as registry:
            assert (registry.revocations(), registry.problems) == ([old], [])
        assert serving.read(H200.name, H200.arch, H200.sm_count, target).revocations == [old]


def test_a_name_is_no_markup(tmp_path):
    with Registry.open(tmp_path / "registry.db", write=True) as registry:
        registry.record(verdict=verdict(device=A100, notes={"made": {"by": "[red]x[/nope]"}}))
    assert "by [red]x[/nope]" in run("show", "--gpu", "A100", "--registry", tmp_path / "registry.db")
