"""Builds the extension with the machine's C++ compiler, once for each PyTorch and Python, into the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from tilebook.native.place import UNIT, built, folder, place, sealed, whole

_MOST_SECONDS = 600.0
_AGAIN_S = 3600.0
_started: list[subprocess.Popen[bytes]] = []


class BuildError(Exception):
    """It cannot be built here; the text says why."""


def build() -> Path:
    """Compiles it, unless it is there and whole, in about a minute; takes its place at once, whoever else builds it.

    Raises:
        BuildError: there is no compiler, it failed, or $TILEBOOK_NATIVE is 0.
    """
    root, there = folder(), built()
    if there is not None and whole(there):
        return there
    if root is None:
        raise BuildError("TILEBOOK_NATIVE=0 asks to do without")
    path = place(root)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("there is no C++ compiler (g++, clang++ or $CXX)")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            library, half = _compiled(compiler, Path(scratch)), Path(scratch) / "whole.so"
            with half.open("wb") as file:
                file.write(sealed(library.read_bytes()))
                file.flush()
                os.fsync(file.fileno())
            os.chmod(half, 0o700)
            os.replace(half, path)
    except OSError as broken:
        raise BuildError(f"{path.parent}: {broken.strerror or broken}") from None
    return path


def _compiled(compiler: str, folder: Path) -> Path:
    """The sources compiled as one, and linked."""
    library = folder / "linked.so"
    home = Path(torch.__file__).parent
    include = [home / "include", home / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    # AT_PER_OPERATOR_HEADERS: PyTorch's headers declare the ops that they use, not each of thousands.
    options = [
        "-O2", "-std=c++20", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-DAT_PER_OPERATOR_HEADERS", *[f"-I{each}" for each in include],
    ]  # fmt: skip
    libraries = [f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10", "-ldl"]
    command = [compiler, *options, "-shared", str(UNIT), "-o", str(library), *libraries]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as broken:
        raise BuildError(f"{compiler}: {broken}") from None
    if done.returncode:
        raise BuildError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
    return library


def begin() -> None:
    """Has it built by a process of its own, at the lowest priority, for the programs to come. Once for all ranks.

    Only on a machine with a GPU. What came to nothing, as `python -m tilebook.native` says why, is tried again after an
    hour.
    """
    root = folder()
    if root is None or torch.version.cuda is None or not Path("/dev/nvidiactl").exists():
        return
    begun = place(root).with_name("begun")
    environment = {name: value for name, value in os.environ.items() if name != "TILEBOOK"}
    with suppress(OSError):
        begun.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            begun.touch(exist_ok=False)
        except FileExistsError:
            if time.time() - begun.stat().st_mtime < _AGAIN_S:
                return
            begun.touch()
        _started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tilebook.native", "--nice"], env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
        )  # fmt: skip
