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

from tilebook.native.place import SOURCES, built, folder, place

_MOST_SECONDS = 600.0
_AGAIN_S = 3600.0
_started: list[subprocess.Popen[bytes]] = []


class BuildError(Exception):
    """It cannot be built here; the text says why."""


def build() -> Path:
    """Compiles it, unless it is there, in about 20 seconds; takes its place at once, whoever else builds it.

    Raises:
        BuildError: there is no compiler, it failed, or $TILEBOOK_NATIVE is 0.
    """
    root, there = folder(), built()
    if there is not None:
        return there
    if root is None:
        raise BuildError("TILEBOOK_NATIVE=0 asks to do without")
    path = place(root)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("there is no C++ compiler (g++, clang++ or $CXX)")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, half = tempfile.mkstemp(".so", dir=path.parent)
    except OSError as broken:
        raise BuildError(f"{path.parent}: {broken.strerror}") from None
    os.close(handle)
    try:
        done = subprocess.run(
            _command(compiler, half), capture_output=True, text=True, timeout=_MOST_SECONDS, check=False
        )
        if done.returncode:
            raise BuildError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
        os.chmod(half, 0o700)
        os.replace(half, path)
    except (OSError, subprocess.TimeoutExpired) as broken:
        raise BuildError(f"{compiler}: {broken}") from None
    finally:
        with suppress(OSError):
            os.unlink(half)
    return path


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


def _command(compiler: str, output: str) -> list[str]:
    home = Path(torch.__file__).parent
    include = [home / "include", home / "include/torch/csrc/api/include", Path(sysconfig.get_path("include"))]
    return [
        compiler, "-O2", "-std=c++20", "-fPIC", "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *[f"-I{each}" for each in include], *[str(each) for each in SOURCES if each.suffix == ".cpp"], "-o", output,
        f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip
