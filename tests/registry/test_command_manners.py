"""How commands behave towards a reader that goes away, a hand that slips, and files that are packed or empty."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_samples import OP, Run, today

from tilebook.cli import main
from tilebook.registry import Registry


@pytest.fixture
def export(run: Run, tmp_path: Path) -> Path:
    with Registry.open(tmp_path / "theirs.db", write=True) as registry:
        registry.merge(verdicts=[today(f"M{rows},N256") for rows in (1, 2, 4, 8)])
    run("export", tmp_path / "theirs.jsonl", "--registry", tmp_path / "theirs.db")
    return tmp_path / "theirs.jsonl"


@pytest.fixture
def packed(export: Path) -> Path:
    file = export.with_name("theirs.jsonl.gz")
    file.write_bytes(gzip.compress(export.read_bytes()))
    return file


def test_an_export_that_gzip_has_packed_is_imported(run: Run, packed: Path, tmp_path: Path) -> None:
    assert "4 verdicts imported" in run("import", packed, "--registry", tmp_path / "a.db").stderr
    assert "4 verdicts imported" in run("import", packed.as_uri(), "--registry", tmp_path / "b.db").stderr
    stream = io.BytesIO(packed.read_bytes())
    assert "4 verdicts imported" in run("import", "-", "--registry", tmp_path / "c.db", input=stream).stderr


class _Server(BaseHTTPRequestHandler):
    def __init__(self, content: bytes, *args: object) -> None:
        self.content = content
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("of", ["file", "http"])
def test_what_is_packed_may_unpack_to_no_more_than_a_url_may_have(run: Run, tmp_path: Path, of: str) -> None:
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(b"{" + b" " * 3_000_000))
    command = ["import", "--max-size", "0.5", "--registry", tmp_path / "a.db"]
    if of == "file":
        said = run(*command, bomb.as_uri(), status=1).stderr
    else:
        server = HTTPServer(("127.0.0.1", 0), partial(_Server, bomb.read_bytes()))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = run(*command, f"http://127.0.0.1:{server.server_port}/bomb.gz", status=1).stderr
        server.shutdown()
    assert "has more than 0 MB unpacked: see --max-size" in said
    assert said.count("\n") == 1


def test_a_packed_file_of_one_endless_line_is_refused_without_reading_it_whole(run: Run, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(b"{" + b" " * 30_000_000))
    assert "line 1 of the import: longer than" in run("import", bomb, status=1).stderr


def test_half_a_packed_file_is_refused_and_changes_nothing(run: Run, packed: Path, tmp_path: Path) -> None:
    packed.write_bytes(packed.read_bytes()[:-20])
    said = run("import", packed, "--registry", tmp_path / "a.db", status=1).stderr
    assert said.startswith(f"tilebook: {packed} is no whole gzip file: ")
    assert said.count("\n") == 1
    assert "no verdicts" in run("show", "--registry", tmp_path / "a.db").stdout


@pytest.mark.parametrize("content", [b"", gzip.compress(b"")], ids=["plain", "packed"])
def test_an_empty_file_is_called_empty(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty").write_bytes(content)
    assert run("import", tmp_path / "empty", status=1).stderr == "tilebook: line 1 of the import: the file is empty\n"


@pytest.mark.parametrize("command", [["check", "--repair"], ["repair"]], ids=" ".join)
def test_repair_makes_no_registry_where_there_is_none(run: Run, tmp_path: Path, command: list[str]) -> None:
    typo = tmp_path / "typo.db"
    assert run(*command, "--registry", typo, status=1).stderr == f"tilebook: there is no registry at {typo}\n"
    assert not typo.exists()
    assert "nothing to repair: there is no registry" in run(*command).stderr
    assert not (tmp_path / "data").exists()


def test_revoke_asks_first_and_changes_nothing_where_nobody_says_yes(run: Run) -> None:
    command = ["revoke", OP.name, "--reason", "a race"]
    said = run(*command, input="n\n", status=1).stderr
    assert "Revoke " in said
    assert OP.name in said
    assert run("revoke", "--list").stdout == "no revocations\n"
    run(*command, status=1)
    run(*command, input="y\n")
    assert OP.name in run("revoke", "--list").stdout
    run(*command, "--yes")


READING = [["show"], ["show", "--all"], ["show", "--format", "json"], ["check"], ["export", "-"], ["revoke", "--list"]]


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_reader_that_goes_away_is_no_error(export: Path, tmp_path: Path, command: list[str]) -> None:
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path), "TILEBOOK_REGISTRY": str(tmp_path / "theirs.db")}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tilebook", *command], stdout=write, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "roken" not in done.stderr


def test_without_click_a_command_names_what_to_install() -> None:
    hide = "import sys; sys.modules['click'] = None; from tilebook.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", hide, "doctor"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pip install click" in done.stderr
    assert "tilebook[" not in done.stderr


def test_no_hint_names_an_extra_of_a_package_that_no_index_has() -> None:
    import tilebook

    for file in Path(tilebook.__file__).parent.rglob("*.py"):
        assert "'tilebook[" not in file.read_text(encoding="utf-8"), file
    assert "tilebook[" not in CliRunner().invoke(main, ["--help"]).output


def test_a_gpu_that_nobody_knows_is_told_from_one_without_verdicts(run: Run, export: Path) -> None:
    run("import", export)
    told = run("show", "--gpu", "H2000").stdout
    assert told.startswith("no verdict fits: no GPU of the catalogue or of a registry is called H2000; there are AMD ")
    assert run("show", "--gpu", "L4").stdout == "no verdict fits\n"


@pytest.mark.parametrize("how", ["text", "read-only"])
def test_where_figures_cannot_go_nothing_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def measured(*_: object) -> object:
        raise AssertionError("it has begun to measure")

    monkeypatch.setattr("tilebook.report.crossover.measured", measured)
    out = tmp_path / "figures.json" if how == "text" else Path("/proc/no/figures.json")
    if how == "text":
        out.write_text("a letter")
    said = run("bench", "crossover", "--device", "cpu", "--out", out, status=2 if how == "text" else 1).stderr
    assert str(out) in said
    assert ("is left as it is" if how == "text" else "cannot be written") in said
    assert how != "text" or out.read_text() == "a letter"
