"""The extension: how it is compiled, kept and found, and what its sources say of each other."""

import os
import re
import shutil
import stat
import subprocess
import sys
import time

import pytest
import torch

from tilebook import enabling, native
from tilebook.native import build, place


def test_it_is_found_once_it_is_built(library, folder, monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(folder))
    assert place.built() == library
    assert native._loaded() is not None
    done = subprocess.run([sys.executable, "-m", "tilebook.native"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(library)
    assert done.stderr == ""


def test_another_copy_in_the_process_is_refused(library, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(folder))
    native._loaded()
    monkeypatch.setenv("TILEBOOK_NATIVE", str(tmp_path))
    path = place.place(tmp_path)
    path.parent.mkdir(mode=0o700)
    shutil.copy2(library, path)
    with pytest.raises(ImportError, match="tilebook_native"):  # and does not end the process
        native._loaded()


def test_a_file_that_others_can_write_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(tmp_path))
    path = place.place(tmp_path)
    path.parent.mkdir(mode=0o700)
    assert place.built() is None
    path.write_bytes(b"")
    path.chmod(0o700)
    assert place.built() == path
    path.chmod(0o720)
    assert place.built() is None
    path.chmod(0o700)
    path.parent.chmod(0o777)
    assert place.built() is None


def test_each_build_of_pytorch_and_python_has_its_own(tmp_path, monkeypatch):
    own = place.place(tmp_path)
    assert place.place(tmp_path) == own
    for where, what in ((torch, "__version__"), (torch.version, "git_version"), (sys, "version")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, "another")
            assert place.place(tmp_path) != own, what


def test_what_is_no_library_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(tmp_path))
    path = place.place(tmp_path)
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"no library")
    path.chmod(0o700)
    assert native._Serving().extension() is None


@pytest.mark.parametrize("left", ["half of it", "a hole", "zeros at its end", "all but a byte"])
def test_a_part_of_one_is_done_without_and_built_anew(library, tmp_path, monkeypatch, left):
    """As a machine leaves it that goes off or whose disk is full: to load it would end the process."""
    monkeypatch.setenv("TILEBOOK_NATIVE", str(tmp_path))
    path, content = place.place(tmp_path), library.read_bytes()
    path.parent.mkdir(mode=0o700)
    half = len(content) // 2
    parts = {
        "half of it": content[:half],
        "a hole": content[: half // 2] + bytes(half) + content[half // 2 + half :],
        "zeros at its end": content[:half] + bytes(len(content) - half),
        "all but a byte": content[:-1],
    }
    path.write_bytes(parts[left])
    path.chmod(0o700)
    code = "from tilebook import native; print(native.available(), native._serving._failed)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False True\n")

    def compiled(compiler, folder):
        (folder / "linked.so").write_bytes(content[:-32])
        return folder / "linked.so"

    monkeypatch.setattr(build, "_compiled", compiled)
    assert build.build() == path
    assert path.read_bytes() == content
    monkeypatch.setattr(build, "_compiled", None)
    assert build.build() == path


@pytest.mark.parametrize(
    ("compiler", "said"), [("false", "false failed"), ("/nowhere/g++", "nowhere"), ("", "no C\\+\\+ compiler")]
)
def test_what_cannot_be_built_is_said(tmp_path, monkeypatch, compiler, said):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.BuildError, match=said):
        build.build()
    assert not [each for each in tmp_path.rglob("*.so")]


def test_one_can_do_without(monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", "0")
    assert place.built() is None
    with pytest.raises(build.BuildError, match="TILEBOOK_NATIVE=0"):
        build.build()


def test_all_sources_are_compiled_and_known():
    included = [line.split('"')[1] for line in place.UNIT.read_text().splitlines() if line.startswith("#include")]
    there = {each.name for pattern in ("*.cpp", "*.h") for each in place.UNIT.parent.glob(pattern)}
    assert {each.name for each in place.SOURCES} == there
    assert {*included, place.UNIT.name} == {name for name in there if name.endswith(".cpp")}


def test_every_op_of_pytorchs_is_served_by_its_types():
    source = place.UNIT.with_name("typed.h").read_text()
    served = {each.name for each in enabling._STANDINGS if each.name.startswith("aten::")}
    assert {f"aten::{name}" for name in re.findall(r"TILEBOOK_TYPED\((\w+)\)\n", source)} == served


def test_what_is_built_is_the_users_own(library):
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700


def test_it_is_begun_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEBOOK_NATIVE", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    begun = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: begun.append((command, options["env"])))
    monkeypatch.setenv("TILEBOOK", "1")
    monkeypatch.setattr(build.Path, "exists", lambda self: True)
    for _ in range(3):
        build.begin()
    ((command, environment),) = begun
    assert command[1:] == ["-m", "tilebook.native", "--nice"]
    assert "TILEBOOK" not in environment
    marker = place.place(tmp_path).with_name("begun")
    os.utime(marker, (time.time() - 7200,) * 2)
    for _ in range(2):
        build.begin()
    assert len(begun) == 2  # it came to nothing, an hour ago
    monkeypatch.setattr(build.Path, "exists", lambda self: False)
    monkeypatch.setenv("TILEBOOK_NATIVE", str(tmp_path / "other"))
    build.begin()
    assert len(begun) == 2
