"""What the commands that read and change registries do with files, strangers' records and what is no longer served."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from registry_samples import an_old_verdict, signed, verdict

import tilebook.registry
from tilebook import device as devices
from tilebook import op as ops
from tilebook.cli import main
from tilebook.registry import Device, Finalist, Registry, Verdict, canonical, load

REPOSITORY = Path(tilebook.registry.__file__).parents[2]
OP = ops.get("rms_norm_fwd")
H200 = devices.find("H200")
PROBLEM = OP.problem.parse("M64,N256", "bf16")
CONFIG = dict(OP.tunable.space.default(PROBLEM, H200))
DEVICE = Device(H200.name, H200.arch, H200.sm_count)
Run = Callable[..., Result]


def measured(**changes: Any) -> Verdict:
    """One of today's kernel."""
    fields = {"problem": PROBLEM.key, "kernel": OP.digest, "config": CONFIG, "device": DEVICE, **changes}
    return verdict(**fields)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with no registry; what ships is one verdict."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("TILEBOOK_REGISTRY", raising=False)
    shipped = tmp_path / "package" / "registry.db"
    monkeypatch.setattr("tilebook.registry.layers.SHIPPED", shipped)
    with Registry.open(shipped, write=True) as registry:
        registry.record(verdict=measured(origin="shipped"))
    return tmp_path


@pytest.fixture
def run(home: Path) -> Run:
    def start(*arguments: object, status: int = 0, **more: Any) -> Result:
        result = CliRunner().invoke(main, [str(each) for each in arguments], **more)
        assert result.exit_code == status, result.output
        return result

    return start


def shown(run: Run, *arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("show", "--format", "json", *arguments).stdout)
    return found


def mine(home: Path) -> Path:
    return home / "data" / "tilebook" / "registry.db"


def old(**changes: Any) -> dict[str, Any]:
    """As a stranger's older tilebook exports one."""
    keys = {"problem": PROBLEM.key, "kernel": OP.digest, "device": DEVICE.content(), "config": CONFIG}
    return an_old_verdict(**{**keys, **changes})


HOSTILE = {
    "a candidate without fields": old(evidence={"candidates": [{}]}),
    "no speed-up": old(speedup=None, speedup_low=None, speedup_high=None),
    "half an interval": old(speedup_low=None),
    "no time": old(time_ms=None),
    "seconds that are text": old(evidence={"seconds": {"total": "long"}}),
    "counts that are text": old(evidence={"rejected": {"slow": "often"}, "tried": "many"}),
}
SKIPPED = {
    "a problem with zero dimensions": old(problem=canonical({**json.loads(PROBLEM.key), "rows": 0})),
    "a problem with a text for a dimension": old(problem=canonical({**json.loads(PROBLEM.key), "rows": "many"})),
    "a problem with an unknown field": old(problem=canonical({**json.loads(PROBLEM.key), "colour": 1})),
}


@pytest.mark.parametrize("record", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_record_that_no_tuner_wrote_is_not_imported(run: Run, home: Path, record: dict[str, Any]) -> None:
    (home / "poison.jsonl").write_text(signed(record, version=1))
    assert "line 2 of the import" in run("import", home / "poison.jsonl", status=1).stderr
    assert len(shown(run)) == 1
    run("status", "--gpu", "H200")


@pytest.mark.parametrize("record", SKIPPED.values(), ids=SKIPPED.keys())
def test_a_problem_that_nobody_can_pose_is_skipped(run: Run, home: Path, record: dict[str, Any]) -> None:
    (home / "zero.jsonl").write_text(signed(record, version=1))
    assert "skipped: line 2: rms_norm_fwd has no problem" in run("import", home / "zero.jsonl").stderr
    assert [each["layer"] for each in shown(run)] == ["shipped"]


@pytest.mark.parametrize("rows", [0, -4, "many", True, None, 1e300])
def test_a_problem_of_a_registry_that_nobody_can_pose_ends_nothing(run: Run, home: Path, rows: Any) -> None:
    key = canonical({**json.loads(PROBLEM.key), "rows": rows})
    with Registry.open(mine(home), write=True) as registry:
        registry.merge(verdicts=[measured(problem=key)])
    assert {each["problem"] for each in shown(run)} == {key, "M64,N256 bf16"}
    run("status", "--gpu", "H200")
    run("explain", OP.name, "--shape", "M128,N256", "--gpu", "H200")


@pytest.mark.parametrize("name", ["NVIDIA [bold]H200[/bold]", "[/nothing]", "[red]", ":smile: [link=x]y"])
def test_a_name_of_a_device_is_no_markup(run: Run, home: Path, name: str) -> None:
    with Registry.open(mine(home), write=True) as registry:
        registry.record(verdict=measured(device=Device(name, "sm_90", 132)))
    assert name in run("show").stdout


def test_a_damaged_row_is_named_passed_over_and_can_be_removed(run: Run, home: Path) -> None:
    with Registry.open(mine(home), write=True) as registry:
        registry.merge(verdicts=[measured(), measured(problem=OP.problem.parse("M8,N256", "bf16").key)])
    with sqlite3.connect(mine(home)) as database:
        database.execute("UPDATE verdict SET notes = '[' WHERE id = 1")
    for command in (["show"], ["status", "--gpu", "H200"], ["show", "--registry", mine(home)]):
        assert "left out 1 damaged row" in run(*command).stderr
    assert "1 damaged rows removed" in run("repair").stderr
    assert run("show").stderr == ""
    assert len(shown(run)) == 2


def test_what_was_removed_as_damaged_leaves_no_part_of_it(run: Run, home: Path) -> None:
    with Registry.open(mine(home), write=True) as registry:
        registry.record(verdict=measured())
    with sqlite3.connect(mine(home)) as database:
        database.execute("UPDATE finalist SET config = '{}'")
    run("repair")
    with sqlite3.connect(mine(home)) as database:
        assert database.execute("SELECT count(*) FROM finalist").fetchone() == (0,)


def test_an_untrusted_claim_never_stands_in_the_way_of_ones_own_work(run: Run, home: Path) -> None:
    (home / "claim.jsonl").write_text(signed(old(), version=1))
    run("import", home / "claim.jsonl")
    own = replace(measured(status="predicted", time_ms=None, default_time_ms=None, interval=None), trusted=True)
    with Registry.open(mine(home), write=True) as registry:
        assert [each.trusted for each in registry.verdicts()] == [False]
        registry.record(verdict=own)
        assert registry.verdicts() == [own]
        with (home / "claim.jsonl").open() as stream:
            load(registry, stream, allowed=None)
        assert registry.verdicts() == [own]


def test_what_dispatch_would_not_serve_is_called_retired(run: Run, home: Path) -> None:
    second = OP.problem.parse("M8,N256", "bf16").key
    gone = Finalist("removed_since", {}, 0.1)
    with Registry.open(mine(home), write=True) as registry:
        registry.merge(
            verdicts=[
                measured(problem=second, kernel="ab" * 32),
                measured(problem=OP.problem.parse("M16,N256", "bf16").key, sources={"triton": "ab" * 32}),
                measured(problem=OP.problem.parse("M32,N256", "bf16").key, finalists=(gone,)),
                measured(op="no_such_op"),
            ]
        )
    assert sorted((each["problem"], each["retired"]) for each in shown(run, "--op", OP.name)) == [
        ("M16,N256 bf16", True),
        ("M32,N256 bf16", True),
        ("M64,N256 bf16", False),
        ("M8,N256 bf16", True),
    ]
    assert "measured, user, retired" in " ".join(run("show", "--all").stdout.split())
    data = json.loads(run("status", "--gpu", "H200", "--format", "json").stdout)
    assert (data["verdicts"], data["layers"], data["retired"]) == ({"measured": 1}, {"shipped": 1}, 4)
    assert "4 more retired" in run("status", "--gpu", "H200").stdout
    run("export", home / "out.jsonl")
    imported = run("import", home / "out.jsonl", "--registry", home / "new.db")
    assert "3 of the file's verdicts are retired" in imported.stderr
    with Registry.open(home / "new.db") as registry:
        assert len(registry.verdicts()) == 3


def test_an_export_without_a_registry_of_ones_own_has_what_show_shows(run: Run, home: Path) -> None:
    assert "1 records written" in run("export", home / "out.jsonl").stderr
    with (home / "out.jsonl").open() as stream, Registry.open(home / "new.db", write=True) as registry:
        load(registry, stream, allowed=None, trust=True)
        assert [each.portable() for each in registry.verdicts()] == [measured().portable()]
    assert run("export", home / "x", "--registry", home / "none.db", status=1).stderr.count("there is no registry") == 1


def test_an_export_after_a_refused_import_has_what_show_shows(run: Run, home: Path) -> None:
    shown = run("export", "-").stdout
    (home / "refused.jsonl").write_text("{}\n")
    run("import", home / "refused.jsonl", status=1)
    assert run("export", "-").stdout == shown


def test_a_dash_is_stdout_and_stdin(run: Run, home: Path) -> None:
    text = run("export", "-").stdout
    assert json.loads(text.splitlines()[0])["records"] == 1
    assert run("export", "/dev/stdout").stdout == text
    assert "1 verdicts imported" in run("import", "-", "--registry", home / "new.db", input=text).stderr


def test_an_export_is_written_through_links_devices_and_fifos(run: Run, home: Path) -> None:
    text = run("export", "-").stdout
    (home / "real.jsonl").write_text(text)
    (home / "link.jsonl").symlink_to("real.jsonl")
    (home / "dangling.jsonl").symlink_to("later.jsonl")
    for link in ("link", "dangling"):
        run("export", home / f"{link}.jsonl")
        assert (home / f"{link}.jsonl").is_symlink()
        assert (home / f"{link}.jsonl").read_text() == text
    os.mkfifo(home / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((home / "pipe").read_text()))
    reader.start()
    run("export", home / "pipe")
    reader.join(10)
    assert read == [text]
    assert stat.S_ISFIFO((home / "pipe").stat().st_mode)
    run("export", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(each.name for each in home.iterdir() if each.name.startswith(".")) == []


def test_an_export_replaces_an_export_and_nothing_else(run: Run, home: Path) -> None:
    text = run("export", "-").stdout
    for before in ("", text, text.partition("\n")[0] + "\n"):
        (home / "out.jsonl").write_text(before)
        run("export", home / "out.jsonl")
        assert (home / "out.jsonl").read_text() == text
    (home / "notes.txt").write_text("my notes\n")
    assert "is no export" in run("export", home / "notes.txt", status=1).stderr
    assert (home / "notes.txt").read_text() == "my notes\n"
    with Registry.open(mine(home), write=True) as registry:
        registry.record(verdict=measured())
    before_bytes = mine(home).read_bytes()
    (home / "alias.db").symlink_to(mine(home))
    for name in (mine(home), home / "alias.db"):
        assert "is no export" in run("export", name, "--registry", mine(home), status=1).stderr
    assert mine(home).read_bytes() == before_bytes
    assert "irectory" in run("export", home, status=1).stderr


def test_a_folder_that_cannot_be_made_is_called_so(run: Run, home: Path) -> None:
    (home / "file").write_text("")
    for place in ("/proc/nope/registry.db", home / "file" / "registry.db"):
        (home / "in.jsonl").write_text(signed(old(), version=1))
        told = run("import", home / "in.jsonl", "--registry", place, status=1).stderr
        assert "corrupt" not in told
        assert "No such file or directory" in told or "Not a directory" in told
        assert told.count("\n") == 1


def test_without_a_home_what_ships_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert [each["layer"] for each in shown(run)] == ["shipped"]
    assert "names a home directory" in run("import", "-", input="", status=1).stderr


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("package", "command"), [("click", "show"), ("rich", "tune"), ("optuna", "tune")])
def test_without_the_extra_a_command_names_it_in_one_line(tmp_path: Path, package: str, command: str) -> None:
    hide = f"import sys; sys.modules[{package!r}] = None; from tilebook.cli import main; main([{command!r}])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install" in done.stderr
    assert "alembic optuna rich" in done.stderr


def test_without_what_the_package_needs_a_command_names_it_and_others_run(tmp_path: Path) -> None:
    hide = """
import sys
for name in ("torch", "triton", "sqlalchemy", "rich", "alembic", "optuna", "numpy"):
    sys.modules[name] = None
from click.testing import CliRunner
from tilebook.cli import main
for command, status in [(["show"], 0), (["status", "--gpu", "H200"], 0), (["check"], 0), (["export", "-"], 0),
                        (["diff", "shipped", "shipped"], 0), (["show", "--op", "no_such_op"], 2), (["tune"], 1),
                        (["explain", "rms_norm_fwd", "--shape", "M1,N8"], 1), (["repair"], 0)]:
    done = CliRunner().invoke(main, command)
    assert done.exit_code == status, (command, done.output, done.exception)
    assert status == 0 or done.stderr.count("\\n") == 1, (command, done.stderr)
    assert status != 1 or "pip install" in done.stderr, (command, done.stderr)
    assert status != 2 or "there are add_fwd, " in done.stderr, (command, done.stderr)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_DATA_HOME": str(tmp_path)}
    environment.pop("TILEBOOK_REGISTRY", None)
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_has_read_enough_hears_nothing_more(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tilebook.cli", "show"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_DATA_HOME": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("export - >&-", "tilebook: stdout is closed: nothing can be written to it\n"),
        ("import - <&-", "tilebook: stdin is closed: there is nothing to read\n"),
        ("show >&-", ""),
        ("show --registry /none.db 2>&-", ""),
    ],
)
def test_a_stream_that_is_closed_is_no_traceback(tmp_path: Path, command: str, said: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_DATA_HOME": str(tmp_path)}
    line = f"exec {sys.executable} -m tilebook.cli {command}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=environment, check=False)
    assert (done.stderr, done.returncode) == (said, int(command != "show >&-"))


def test_what_is_no_text_is_refused(run: Run, home: Path) -> None:
    assert "UTF-8" in run("import", "-", input=io.BytesIO(b'{"\xff\xfe'), status=1).stderr


@pytest.mark.parametrize("dtype", ["", "[red]bf16", "x" * 99, 7, None])
def test_a_problem_of_no_plain_dtype_is_left_out(run: Run, home: Path, dtype: object) -> None:
    key = canonical({**json.loads(PROBLEM.key), "dtype": dtype})
    (home / "odd.jsonl").write_text(signed({"type": "verdict", **measured(problem=key).portable()}), encoding="utf-8")
    assert "skipped: line 2: rms_norm_fwd has no problem" in run("import", home / "odd.jsonl").stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_what_cannot_be_written_is_named_in_one_line(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("export", "/dev/full", status=1).output
    assert "/dev/full cannot be written: No space left on device" in said
    full = partial(Path("/dev/full").open, "w+", encoding="utf-8")
    monkeypatch.setattr("tilebook.registry.lines._aside", full)
    said = run("export", str(home / "out.jsonl"), status=1).output
    assert f"{tempfile.gettempdir()}, where its records wait: No space left on device" in said
    assert not [each for each in home.iterdir() if "out.jsonl" in each.name]


def test_a_merge_that_cannot_be_written_names_what_was_to_be_made(run: Run, home: Path) -> None:
    (home / "file").write_text("")
    run("export", str(home / "made.jsonl"))
    said = run("merge", str(home / "made.jsonl"), "-o", str(home / "file" / "new.db"), status=1).output
    assert f"registry {home / 'file' / 'new.db'}: " in said
